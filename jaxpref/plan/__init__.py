"""Estimates of a run's FLOPs, memory and time, without running it."""
