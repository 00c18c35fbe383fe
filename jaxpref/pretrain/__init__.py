"""Training of the bundled base pipeline from scratch; see configs/shapes_base.py."""
