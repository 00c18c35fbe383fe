"""Optimizer, learning-rate schedules and the exponential moving average."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref.base_config import SCHEDULES


def make_schedule(
  name: str,
  *,
  lr: float,
  warmup_updates: int,
  num_updates: int,
  decay: float = 0.2,
) -> optax.Schedule:
  """The learning rate as a function of the number of updates done.

  Args:
    name: after the linear warm-up, 'constant' stays at `lr`, 'linear' and 'cosine' fall
      to 0 at the end of the run, 'trapezoid' stays and falls linearly over the last
      `decay` share of the run.
    lr: the peak.
    warmup_updates: from 0 to `lr`, linearly.
    num_updates: of the whole run, the warm-up included.
    decay: see 'trapezoid'; unused by the others.

  Raises:
    ValueError: the name is unknown.
  """
  left = max(num_updates - warmup_updates, 1)
  match name:
    case "constant":
      after = optax.constant_schedule(lr)
    case "linear":
      after = optax.linear_schedule(lr, 0.0, left)
    case "cosine":
      after = optax.cosine_decay_schedule(lr, left)
    case "trapezoid":
      fall = max(int(decay * num_updates), 1)
      after = optax.linear_schedule(lr, 0.0, fall, max(left - fall, 0))
    case _:
      raise ValueError(f"the schedule is one of {SCHEDULES}, not {name!r}")
  if not warmup_updates:
    return after
  # Not from 0: the first update would do nothing.
  warmup = optax.linear_schedule(lr / warmup_updates, lr, warmup_updates - 1)
  return optax.join_schedules([warmup, after], [warmup_updates])


def make_optimizer(
  schedule: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm; `clip_norm=None` does not clip."""
  adamw = optax.chain(
    _scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )
  if clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """`optax.scale_by_adam`, with moments that are finished before they are used.

  Else XLA computes them a second time, from the old ones, where the parameters are updated,
  and so it may not write them over the old ones before that: it copies all of those first.
  """

  def update(grads, state, params=None):
    del params
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    mu, nu = jax.lax.optimization_barrier((mu, nu))
    count = optax.safe_increment(state.count)
    updates = jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + eps),
      optax.tree.bias_correction(mu, b1, count),
      optax.tree.bias_correction(nu, b2, count),
    )
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam().init, update)


def update_ema(ema: Any, params: Any, update: jax.Array, *, decay: float) -> Any:
  """The moving average after an update, with a ramp at its start.

  Args:
    ema: averages, float32, as `params`.
    params: after the update.
    update: n, how many updates were done before this one, int32 scalar.
    decay: its limit; early on (1 + n) / (10 + n) is smaller and used instead. The first
      update, n = 0, sets the average to the parameters, as in diffusers' EMAModel.
  """
  n = update.astype(jnp.float32)
  kept = jnp.where(n > 0, jnp.minimum(decay, (1.0 + n) / (10.0 + n)), 0.0)
  return jax.tree.map(lambda e, p: e + (1.0 - kept) * (p - e), ema, params)
