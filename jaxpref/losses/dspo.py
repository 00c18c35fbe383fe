"""DSPO: direct score preference optimization (Zhu et al., ICLR 2025).

Score matching on the preferred image. While the policy does not yet separate the preferred
image from the other one, the target moves away from the reference. The loss needs predictions,
not only their errors. The form is that of Fu et al.'s public code
(https://arxiv.org/abs/2511.03317): one beta is both weight and scale, and the weight carries a
gradient.
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
  """Computes mean((r_w - beta (1 - sigmoid(logit)) (r_w - r_ref_w))^2).

  r is prediction minus target; logit = beta / 2 ((err_l - ref_l) - (err_w - ref_w)), with
  err_w = mean(r_w^2) and ref_w = mean(r_ref_w^2).

  Args:
    residual_w: the policy's predictions minus targets on the preferred images, [B, ...].
    residual_ref_w: the reference's predictions minus the same targets, [B, ...].
    err_l: the policy's errors on the other images, [B].
    ref_l: the reference's errors on the other images, [B].
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
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, ref = to_errors(terms.err), to_errors(terms.ref)
  loss = dspo_loss(terms.err["w"], terms.ref["w"], err["l"], ref["l"], beta=beta)
  return loss, reward_metrics(err["w"], err["l"], ref["w"], ref["l"])
