"""SPIN-Diffusion: self-play against the previous iterate (Yuan et al., 2024).

https://arxiv.org/abs/2402.10210: DPO's loss, in which the winner is a real image, the loser a
sample of the previous iterate, and the reference the previous iterate.
`jaxpref.training.iterate` generates the losers and starts each iterate.
"""

import jax

from jaxpref.losses.base import Needs, Terms
from jaxpref.losses.dpo import dpo_loss, reward_metrics

NEEDS = Needs(rows="pairs", reference=True)


def spin_loss(
  err_w: jax.Array, err_l: jax.Array, ref_w: jax.Array, ref_l: jax.Array, *, beta: float
) -> jax.Array:
  """Computes the DPO loss of real images over samples of the previous iterate.

  Args:
    err_w: the policy's errors on real images, [B].
    err_l: the policy's errors on samples of the previous iterate, at the same timestep and
      noise, [B].
    ref_w: the previous iterate's errors on the real images, [B].
    ref_l: the previous iterate's errors on its samples, [B].
    beta: as for `dpo_loss`.

  Returns:
    Losses, [B]; ln 2 where policy = previous iterate.
  """
  return dpo_loss(err_w, err_l, ref_w, ref_l, beta=beta)


def objective(terms: Terms, *, beta):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  errors = (terms.err["w"], terms.err["l"], terms.ref["w"], terms.ref["l"])
  return spin_loss(*errors, beta=beta), reward_metrics(*errors)
