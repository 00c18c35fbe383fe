"""Configurations: a file a method, read top to bottom."""
