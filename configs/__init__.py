"""Configurations: one file per method."""
