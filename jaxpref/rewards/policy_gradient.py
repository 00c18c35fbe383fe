"""Losses on the log-probabilities of single steps: DDPO, DPOK, and variants of GRPO.

All take log-probabilities from `likelihood` and return one loss per step. The ratio of policy
and sampling policy is that of one step, not of a whole path, so clipped losses have the exact
gradient of the expected reward only where both policies are equal. With one update for each
batch of samples they are, and `log_prob_old` is `stop_gradient(log_prob)`.
"""

import jax
import jax.numpy as jnp

_MOST = 20.0  # largest absolute log-ratio: beyond it, the exponential overflows


def score_function_loss(log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
  """Returns -A log p, whose gradient is the policy gradient (DDPO-SF, arXiv 2305.13301)."""
  return -advantage * log_prob


def ppo_loss(
  log_prob: jax.Array,
  log_prob_old: jax.Array,
  advantage: jax.Array,
  *,
  clip: float,
  clip_high: float | None = None,
) -> jax.Array:
  """Computes PPO's clipped loss: max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)).

  DDPO-IS and the variants of GRPO. A step that is outside the range on the side from which
  its advantage leads away keeps its gradient.

  Args:
    log_prob: the policy's log-probability of the step, [B].
    log_prob_old: that of the policy that sampled, [B].
    advantage: of the image, [B].
    clip: how far the ratio rho may fall below 1.
    clip_high: how far it may exceed 1; None: as far as `clip`.

  Returns:
    Losses, [B].
  """
  ratio = ratio_of(log_prob, log_prob_old)
  return clipped_loss(ratio, advantage, clip=clip, high=clip_high)


def ratio_of(log_prob: jax.Array, log_prob_old: jax.Array) -> jax.Array:
  """Computes the ratio of probabilities, between exp(-20) and exp(20)."""
  return jnp.exp(jnp.clip(log_prob - log_prob_old, -_MOST, _MOST))


def clipped_loss(
  ratio: jax.Array, advantage: jax.Array, *, clip: float, high: float | None = None
) -> jax.Array:
  """Computes `ppo_loss` for a ratio, such as `guarded_ratio`."""
  inside = jnp.clip(ratio, 1 - clip, 1 + (clip if high is None else high))
  return jnp.maximum(-advantage * ratio, -advantage * inside)


def dpok_loss(
  log_prob: jax.Array, log_prob_old: jax.Array, advantage: jax.Array, *, clip: float
) -> jax.Array:
  """Computes -A clip(rho), the loss of DPOK's code (arXiv 2305.16381).

  Without PPO's maximum, a step outside the range has no gradient, whichever way it would move.
  The arguments are those of `ppo_loss`.
  """
  return -advantage * jnp.clip(ratio_of(log_prob, log_prob_old), 1 - clip, 1 + clip)


def guarded_ratio(
  log_prob: jax.Array,
  log_prob_old: jax.Array,
  mean: jax.Array,
  mean_old: jax.Array,
  std: jax.Array,
) -> jax.Array:
  """Computes GRPO-Guard's ratio, whose spread is the same for all noise levels.

  exp(s (log rho + mean (mu - mu_old)^2 / (2 s^2))) with s the step's deviation: the expected
  log-ratio is added back, so that the mean is not below 1, and the factor s evens out steps of
  little noise, whose ratios vary most.

  Args:
    log_prob: see `ppo_loss`.
    log_prob_old: see `ppo_loss`.
    mean: of the policy's step, [B, ...].
    mean_old: of the sampling policy's step, [B, ...].
    std: of both, positive, [B].
  """
  axes = tuple(range(1, mean.ndim))
  distance = jnp.mean(jnp.square(mean - mean_old), axis=axes) / (2 * jnp.square(std))
  return jnp.exp(jnp.clip(std * (log_prob - log_prob_old + distance), -_MOST, _MOST))


def keeps(
  kl: jax.Array, ratio: jax.Array, advantage: jax.Array, *, threshold: float
) -> jax.Array:
  """Tells which steps stay inside a trust region, bool [B] (Flow-DPPO).

  A step is left out if its divergence from the sampling policy has reached the threshold and
  its ratio has moved the way that its advantage leads.

  Args:
    kl: of the policy's step and the sampling policy's, [B], see `likelihood.gaussian_kl`.
    ratio: of their probabilities, [B].
    advantage: of the image, [B].
    threshold: of the divergence.
  """
  outward = jnp.where(advantage > 0, ratio > 1, ratio < 1)
  return ~((kl >= threshold) & outward)


def ratio_metrics(
  ratio: jax.Array, log_prob: jax.Array, log_prob_old: jax.Array, *, clip: float
) -> dict[str, jax.Array]:
  """Computes the usual numbers about a policy's distance from the sampling policy, [B] each."""
  ratio, now, old = jax.lax.stop_gradient((ratio, log_prob, log_prob_old))
  return {
    "ratio/mean": ratio,
    "ratio/approx_kl": 0.5 * jnp.square(now - old),
    "ratio/clipped_high": (ratio > 1 + clip).astype(jnp.float32),
    "ratio/clipped_low": (ratio < 1 - clip).astype(jnp.float32),
  }
