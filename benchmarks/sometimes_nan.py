"""Diffusion-DRO with a non-finite loss in some updates, for benchmarks/faults.py."""

import jax.numpy as jnp

from jaxpref.losses import dro

NEEDS = dro.NEEDS
_LARGE = 0.6  # about a fifth of the tiny pipeline's batches have a larger mean error


def objective(terms, *, margin):
  """Returns dro's loss; loss and gradient are NaN for batches with large errors."""
  loss, metrics = dro.objective(terms, margin=margin)
  return loss * jnp.where(terms.ref["e"].mean() > _LARGE, jnp.nan, 1.0), metrics
