"""Supervised fine-tuning on expert images: the denoising error itself."""

import jax

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="experts")


def sft_loss(err: jax.Array) -> jax.Array:
  """The plain denoising loss.

  Args:
    err: denoising errors of expert images, [B].

  Returns:
    The same, [B].
  """
  return err


def objective(terms: Terms):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  return sft_loss(terms.err["e"]), {}
