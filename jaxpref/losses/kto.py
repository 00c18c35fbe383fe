"""Diffusion-KTO: images labelled as liked or not, without pairs (Li et al., 2024).

https://arxiv.org/abs/2404.04465, after Ethayarajh et al.'s KTO: a utility function, which
models people's attitude to gains and losses, maps each image's implicit reward.
"""

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="singles", reference=True)
UTILITIES = ("kt", "loss_averse", "risk_seeking")


def kto_loss(
  err: jax.Array,
  ref: jax.Array,
  desirable: jax.Array,
  *,
  beta: float,
  kl: jax.Array | float,
  utility: str = "kt",
  weight_desirable: float = 1.0,
  weight_undesirable: float = 1.0,
) -> jax.Array:
  """Computes w (1 - U(s beta (g - kl))), g = ref - err, s = 1 for desirable images, else -1.

  `utility` names U:
    'kt': sigmoid(v), Kahneman and Tversky's, concave in gains, convex in losses; the loss is
      0.5 where policy = reference and kl = 0;
    'loss_averse': log sigmoid(v), concave;
    'risk_seeking': -log sigmoid(-v), convex.

  Args:
    err: the policy's errors, [B].
    ref: the reference's errors, [B].
    desirable: whether the image is a good one, bool or 0 and 1, [B].
    beta: scale of the reward.
    kl: the reference point of the rewards, see `reference_point`.
    utility: 'kt', 'loss_averse' or 'risk_seeking'.
    weight_desirable: w of desirable images.
    weight_undesirable: w of the other images.

  Returns:
    Losses, [B].

  Raises:
    UserError: `utility` is unknown.
  """
  good = desirable.astype(bool)
  value = jnp.where(good, 1.0, -1.0) * beta * (ref - err - kl)
  match utility:
    case "kt":
      gain = jax.nn.sigmoid(value)
    case "loss_averse":
      gain = jax.nn.log_sigmoid(value)
    case "risk_seeking":
      gain = -jax.nn.log_sigmoid(-value)
    case _:
      raise UserError(f"loss.utility must be one of {', '.join(UTILITIES)} (got {utility!r})")
  return jnp.where(good, weight_desirable, weight_undesirable) * (1.0 - gain)


def reference_point(err: jax.Array, ref: jax.Array, mean) -> jax.Array:
  """Computes the mean reward of the batch, at least 0: a scalar without gradient.

  Args:
    err: the policy's errors, [B].
    ref: the reference's errors, [B].
    mean: averages an array over the batch of all devices.
  """
  return jax.lax.stop_gradient(jnp.maximum(mean(ref - err), 0.0))


def objective(terms: Terms, *, beta, utility, weight_desirable, weight_undesirable):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, ref, good = terms.err["x"], terms.ref["x"], terms.labels["desirable"]
  kl = reference_point(err, ref, terms.mean)
  loss = kto_loss(
    err,
    ref,
    good,
    beta=beta,
    kl=kl,
    utility=utility,
    weight_desirable=weight_desirable,
    weight_undesirable=weight_undesirable,
  )
  sign = jnp.where(good.astype(bool), 1.0, -1.0)
  return loss, {
    "rewards/margin": sign * (ref - err),
    "rewards/accuracy": (sign * (ref - err - kl) > 0).astype(jnp.float32),
    "kto/kl": kl,
    "kto/desirable": good.astype(jnp.float32),
  }
