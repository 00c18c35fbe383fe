"""Base against tuned: generate, score, compare, report."""
