"""SPIN-Diffusion: self-play against the previous iterate (Yuan et al., 2024).

https://arxiv.org/abs/2402.10210: DPO's loss in which the winner is a real image, the loser
one that the previous iterate has drawn, and the reference that iterate.
`jaxpref.training.iterate` draws the losers and begins a new iterate.
"""

import jax

from jaxpref.losses.base import Needs, Terms
from jaxpref.losses.dpo import dpo_loss, reward_metrics

NEEDS = Needs(rows="pairs", reference=True)


def spin_loss(
  err_w: jax.Array, err_l: jax.Array, ref_w: jax.Array, ref_l: jax.Array, *, beta: float
) -> jax.Array:
  """DPO of real images over the previous iterate's.

  Args:
    err_w: the policy's errors on real images, [B].
    err_l: on images that the previous iterate drew, at the same timestep and noise, [B].
    ref_w: the previous iterate's errors on the former, [B].
    ref_l: and on the latter, [B].
    beta: as for `dpo_loss`.

  Returns:
    Losses, [B]; ln 2 where policy and previous iterate are the same.
  """
  return dpo_loss(err_w, err_l, ref_w, ref_l, beta=beta)


def objective(terms: Terms, *, beta):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  errors = (terms.err["w"], terms.err["l"], terms.ref["w"], terms.ref["l"])
  return spin_loss(*errors, beta=beta), reward_metrics(*errors)
