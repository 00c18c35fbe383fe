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
  """Makes the learning rate, a function of the number of updates done.

  Args:
    name: what follows the linear warm-up: 'constant' stays at `lr`; 'linear' and 'cosine'
      decay to 0 at the end of the run; 'trapezoid' stays at `lr` and decays linearly over
      the last `decay` of the run.
    lr: peak learning rate.
    warmup_updates: number of updates of the linear warm-up; 0: none.
    num_updates: number of updates of the run, including the warm-up.
    decay: share of the run over which 'trapezoid' decays; the others ignore it.

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
      raise ValueError(f"the schedule must be one of {', '.join(SCHEDULES)} (got {name!r})")
  if not warmup_updates:
    return after
  # Starts above 0: with a learning rate of 0, the first update would change nothing.
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
  """Makes AdamW with clipping by the global norm; `clip_norm=None` does not clip."""
  adamw = optax.chain(
    _scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(schedule),
  )
  if clip_norm is None:
    return adamw
  return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Makes `optax.scale_by_adam` with a barrier after the moments.

  Without the barrier, XLA recomputes the new moments from the old ones inside the update of
  the parameters. It then needs the old moments until the end, cannot overwrite them in place,
  and copies all of them first.
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
  """Returns the EMA weights after an update; the decay starts at 0 and rises.

  Args:
    ema: EMA weights, float32, a tree like `params`.
    params: parameters after the update.
    update: n, the number of updates done before this one, int32 scalar.
    decay: limit of the decay. Early on, (1 + n) / (10 + n) is smaller and is used instead.
      The first update, n = 0, sets the average to the parameters, as in diffusers' EMAModel.
  """
  n = update.astype(jnp.float32)
  kept = jnp.where(n > 0, jnp.minimum(decay, (1.0 + n) / (10.0 + n)), 0.0)
  return jax.tree.map(lambda e, p: e + (1.0 - kept) * (p - e), ema, params)
