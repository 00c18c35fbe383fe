"""SPIN-Diffusion: self-play against the previous iterate (Yuan et al., 2024).

https://arxiv.org/abs/2402.10210: DPO's loss in which the winner is a real image, the loser
one that the previous iterate draws, and the reference that iterate. A new iterate begins
every `rollout.refresh_every` updates.
"""

import jax

from jaxpref.losses.contract import Needs, Terms
from jaxpref.losses.dpo import dpo_loss, reward_metrics

NEEDS = Needs(rows="experts", rollout="images", reference="previous")


def spin_loss(
  err_e: jax.Array, err_p: jax.Array, ref_e: jax.Array, ref_p: jax.Array, *, beta: float
) -> jax.Array:
  """DPO of real images over the previous iterate's.

  Args:
    err_e: the policy's errors on real images, [B].
    err_p: on images that the previous iterate drew, at the same timestep and noise, [B].
    ref_e: the previous iterate's errors on the former, [B].
    ref_p: and on the latter, [B].
    beta: as for `dpo_loss`.

  Returns:
    Losses, [B]; ln 2 where policy and previous iterate are the same.
  """
  return dpo_loss(err_e, err_p, ref_e, ref_p, beta=beta)


def objective(terms: Terms, *, beta):
  """Loss and metrics; the contract is in `jaxpref.losses.contract`."""
  errors = (terms.err["e"], terms.err["p"], terms.ref["e"], terms.ref["p"])
  return spin_loss(*errors, beta=beta), reward_metrics(*errors)
