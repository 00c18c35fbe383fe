"""Training: programs, the loop, outer iterations."""
