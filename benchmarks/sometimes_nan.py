"""Diffusion-DRO whose loss is not finite in some updates, for benchmarks/faults.py."""

import jax.numpy as jnp

from jaxpref.losses import dro

NEEDS = dro.NEEDS
_LARGE = 0.6  # of the tiny pipeline's mean error: about a fifth of its batches


def objective(terms, *, margin):
  """As dro's; not a number, nor its gradient, where the batch's errors are large."""
  loss, metrics = dro.objective(terms, margin=margin)
  return loss * jnp.where(terms.ref["e"].mean() > _LARGE, jnp.nan, 1.0), metrics
