"""Diffusion-DPO (Wallace et al., 2023, https://arxiv.org/abs/2311.12908), and two variants.

Both variants apply another loss to Diffusion-DPO's margin: the hinge of SLiC (Zhao et al.,
2023, https://arxiv.org/abs/2305.10425) and the square of IPO (Azar et al., 2023,
https://arxiv.org/abs/2310.12036).
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
  """Computes the Diffusion-DPO loss of preferred images over the others.

  With margin = (err_l - ref_l) - (err_w - ref_w):
    'sigmoid': -log sigmoid(beta / 2 margin), which is ln 2 where policy = reference;
    'hinge': max(1 - beta / 2 margin, 0);
    'ipo': (margin - 1 / (2 beta))^2.

  Args:
    err_w: the policy's errors on the preferred images, [B].
    err_l: the policy's errors on the other images, at the same timestep and noise, [B].
    ref_w: the reference's errors on the preferred images, [B].
    ref_l: the reference's errors on the other images, [B].
    beta: strength of the tie to the reference; includes the factor of the number of timesteps.
    variant: 'sigmoid', 'hinge' or 'ipo'.

  Returns:
    Losses, [B].

  Raises:
    UserError: `variant` is unknown.
  """
  margin = (err_l - ref_l) - (err_w - ref_w)
  match variant:
    case "sigmoid":
      return -jax.nn.log_sigmoid(0.5 * beta * margin)
    case "hinge":
      return jax.nn.relu(1.0 - 0.5 * beta * margin)
    case "ipo":
      return jnp.square(margin - 1.0 / (2.0 * beta))
  raise UserError(f"loss.variant must be one of {', '.join(VARIANTS)} (got {variant!r})")


def objective(terms: Terms, *, beta, variant):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, ref = terms.err, terms.ref
  loss = dpo_loss(err["w"], err["l"], ref["w"], ref["l"], beta=beta, variant=variant)
  return loss, reward_metrics(err["w"], err["l"], ref["w"], ref["l"])


def reward_metrics(err_w, err_l, ref_w, ref_l):
  """Computes the implicit rewards (reference error minus policy error) of both images."""
  reward_w, reward_l = ref_w - err_w, ref_l - err_l
  return {
    "rewards/winner": reward_w,
    "rewards/loser": reward_l,
    "rewards/margin": reward_w - reward_l,
    "rewards/accuracy": (reward_w > reward_l).astype(jnp.float32),
  }
