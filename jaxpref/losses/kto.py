"""Diffusion-KTO: images that are liked or not, no pairs (Li et al., 2024).

https://arxiv.org/abs/2404.04465, after Ethayarajh et al.'s KTO: each image's implicit reward
goes through a utility of people's attitude to gain and loss.
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
  """Weight w times 1 - U(s beta (g - kl)), g = ref - err, s = 1 for desirable images or -1.

  U is, by the name of `utility`,
    'kt': sigmoid(v), Kahneman and Tversky's, concave in gains, convex in losses; the loss is
      0.5 where policy = reference and kl = 0;
    'loss_averse': log sigmoid(v), concave;
    'risk_seeking': -log sigmoid(-v), convex.

  Args:
    err: the policy's errors, [B].
    ref: the reference's, [B].
    desirable: whether the image is a good one, bool or 0 and 1, [B].
    beta: scale of the reward.
    kl: what rewards are measured from; the mean reward of the batch of all devices, not
      below 0, see `reference_point`.
    utility: see above.
    weight_desirable: w of desirable images.
    weight_undesirable: w of the others.

  Returns:
    Losses, [B].

  Raises:
    UserError: there is no such utility.
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
      raise UserError(f"loss.utility is one of {', '.join(UTILITIES)}, not {utility!r}")
  return jnp.where(good, weight_desirable, weight_undesirable) * (1.0 - gain)


def reference_point(err: jax.Array, ref: jax.Array, mean) -> jax.Array:
  """The batch's mean reward, not below 0, a scalar that carries no gradient.

  Args:
    err: the policy's errors, [B].
    ref: the reference's, [B].
    mean: of an array over the batch of all devices.
  """
  return jax.lax.stop_gradient(jnp.maximum(mean(ref - err), 0.0))


def objective(terms: Terms, *, beta, utility, weight_desirable, weight_undesirable):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
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
