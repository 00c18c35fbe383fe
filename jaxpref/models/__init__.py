"""Models: diffusers and transformers Flax modules, and directories of weights."""
