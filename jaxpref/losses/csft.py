"""Conditional supervised fine-tuning: the prompt says whether the image is good or bad.

A baseline of Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
2024 (https://arxiv.org/abs/2402.01306), after Korbak et al., 2023: the model learns both
kinds, and the prompts for sampling ask for the good one. `data.good_prefix` and
`data.bad_prefix` are the words.
"""

import jax

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="singles")


def csft_loss(err: jax.Array) -> jax.Array:
  """Returns the plain denoising loss; the method is in the prompts' prefixes.

  Args:
    err: denoising errors of labelled images under their prefixed prompts, [B].

  Returns:
    The same errors, [B].
  """
  return err


def objective(terms: Terms):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  good = terms.labels["desirable"]
  err = terms.err["x"]
  return csft_loss(err), {"csft/desirable": good.astype(err.dtype)}
