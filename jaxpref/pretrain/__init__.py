"""Training of the shapes world's base pipelines from scratch: a UNet's and an MMDiT's."""
