"""Diffusion-DPO (Wallace et al., 2023, https://arxiv.org/abs/2311.12908), and two variants.

The hinge is SLiC's (Zhao et al., 2023, https://arxiv.org/abs/2305.10425), the square IPO's
(Azar et al., 2023, https://arxiv.org/abs/2310.12036), both on Diffusion-DPO's margin.
"""

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="pairs", reference=True)
VARIANTS = ("sigmoid", "hinge", "ipo")


def dpo_loss(
  err_w: jax.Array,
  err_l: jax.Array,
  ref_w: jax.Array,
  ref_l: jax.Array,
  *,
  beta: float,
  variant: str = "sigmoid",
) -> jax.Array:
  """How surely the policy, against the reference, tells the winner from the loser.

  With margin = (err_l - ref_l) - (err_w - ref_w):
    'sigmoid': -log sigmoid(beta / 2 margin), which is ln 2 where policy = reference;
    'hinge': max(1 - beta / 2 margin, 0);
    'ipo': (margin - 1 / (2 beta))^2.

  Args:
    err_w: the policy's errors on preferred images, [B].
    err_l: on the others, at the same timestep and noise, [B].
    ref_w: the reference's errors on the former, [B].
    ref_l: and on the latter, [B].
    beta: how much the policy is bound to the reference; the number of timesteps is folded in.
    variant: see above.

  Returns:
    Losses, [B].

  Raises:
    UserError: there is no such variant.
  """
  margin = (err_l - ref_l) - (err_w - ref_w)
  match variant:
    case "sigmoid":
      return -jax.nn.log_sigmoid(0.5 * beta * margin)
    case "hinge":
      return jax.nn.relu(1.0 - 0.5 * beta * margin)
    case "ipo":
      return jnp.square(margin - 1.0 / (2.0 * beta))
  raise UserError(f"loss.variant is one of {', '.join(VARIANTS)}, not {variant!r}")


def objective(terms: Terms, *, beta, variant):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err, ref = terms.err, terms.ref
  loss = dpo_loss(err["w"], err["l"], ref["w"], ref["l"], beta=beta, variant=variant)
  return loss, reward_metrics(err["w"], err["l"], ref["w"], ref["l"])


def reward_metrics(err_w, err_l, ref_w, ref_l):
  """The implicit rewards, how far the policy leads the reference, of either image."""
  reward_w, reward_l = ref_w - err_w, ref_l - err_l
  return {
    "rewards/winner": reward_w,
    "rewards/loser": reward_l,
    "rewards/margin": reward_w - reward_l,
    "rewards/accuracy": (reward_w > reward_l).astype(jnp.float32),
  }
