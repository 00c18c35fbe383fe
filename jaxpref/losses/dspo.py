"""DSPO: direct score preference optimization (Zhu et al., ICLR 2025).

The winner's score matching with a target that moves away from the reference where the
policy does not yet tell winner from loser. Needs predictions, not only their errors. After
the form in Fu et al.'s public code (https://arxiv.org/abs/2511.03317), in which one beta
serves both places and the weight carries a gradient, too.
"""

import jax

from jaxpref.losses.base import Needs, Terms, to_errors
from jaxpref.losses.dpo import reward_metrics

NEEDS = Needs(rows="pairs", reference=True, residuals=True)


def dspo_loss(
  residual_w: jax.Array,
  residual_ref_w: jax.Array,
  err_l: jax.Array,
  ref_l: jax.Array,
  *,
  beta: float,
) -> jax.Array:
  """mean((r_w - beta (1 - sigmoid(logit)) (r_w - r_ref_w))^2).

  r is prediction minus target; logit = beta / 2 ((err_l - ref_l) - (err_w - ref_w)), with
  err_w = mean(r_w^2) and ref_w = mean(r_ref_w^2).

  Args:
    residual_w: the policy's predictions minus targets on preferred images, [B, ...].
    residual_ref_w: the reference's, [B, ...].
    err_l: the policy's errors on the others, [B].
    ref_l: the reference's, [B].
    beta: weight, and scale of the logit.

  Returns:
    Losses, [B].
  """
  moved = residual_w - residual_ref_w
  of = to_errors({"w": residual_w, "ref_w": residual_ref_w})
  lead = (err_l - ref_l) - (of["w"] - of["ref_w"])
  weight = beta * jax.nn.sigmoid(-0.5 * beta * lead)
  weight = weight.reshape((-1,) + (1,) * (residual_w.ndim - 1))
  return to_errors({"w": residual_w - weight * moved})["w"]


def objective(terms: Terms, *, beta):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err, ref = to_errors(terms.err), to_errors(terms.ref)
  loss = dspo_loss(terms.err["w"], terms.ref["w"], err["l"], ref["l"], beta=beta)
  return loss, reward_metrics(err["w"], err["l"], ref["w"], ref["l"])
