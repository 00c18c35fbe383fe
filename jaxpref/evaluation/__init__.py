"""Evaluation of a tuned model against its base: generate, score, compare, report."""
