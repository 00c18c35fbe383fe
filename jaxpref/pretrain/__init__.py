"""Training of the bundled base pipeline from scratch, with configs/shapes_base.py."""
