"""Conditional supervised fine-tuning: good and bad images, each said to be so in its prompt.

A baseline of Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization",
2024 (https://arxiv.org/abs/2402.01306), after Korbak et al., 2023: the model learns both
kinds and is then asked for the good one. The words are `data.good_prefix` and
`data.bad_prefix`.
"""

import jax

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="singles")


def csft_loss(err: jax.Array) -> jax.Array:
  """The plain denoising loss; what is particular is in the prompts.

  Args:
    err: denoising errors of labelled images under their prefixed prompts, [B].

  Returns:
    The same, [B].
  """
  return err


def objective(terms: Terms):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  good = terms.labels["desirable"]
  err = terms.err["x"]
  return csft_loss(err), {"csft/desirable": good.astype(err.dtype)}
