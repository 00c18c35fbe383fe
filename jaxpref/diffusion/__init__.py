"""Noise schedules and samplers: arrays in, arrays out, no models and no I/O."""
