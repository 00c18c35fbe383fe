"""Diffusion transformers as flax modules, with the parameters of diffusers' PyTorch classes."""
