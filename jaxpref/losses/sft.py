"""Supervised fine-tuning on expert images: the denoising error."""

import jax

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="experts")


def sft_loss(err: jax.Array) -> jax.Array:
  """Returns the plain denoising loss.

  Args:
    err: denoising errors of expert images, [B].

  Returns:
    The same errors, [B].
  """
  return err


def objective(terms: Terms):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  return sft_loss(terms.err["e"]), {}
