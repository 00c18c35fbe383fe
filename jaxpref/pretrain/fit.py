"""A stage's updates, from its newest checkpoint, with its metrics; for every pretraining."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.errors import UserError
from jaxpref.runtime import checkpoint, metrics
from jaxpref.training import optimizer


@flax.struct.dataclass
class State:
  """Parameters, EMA weights, optimizer state, completed updates."""

  params: Any
  ema: Any
  opt_state: Any
  update: jax.Array


def init_state(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> State:
  """Makes the state before the first update, whole on each device."""
  ema = jax.tree.map(jnp.copy, params)
  state = State(params, ema, tx.init(params), jnp.int32(0))
  return jax.device_put(state, sharding.replicated(mesh))


def apply_gradients(
  state: State, grads: Any, tx: optax.GradientTransformation, *, ema_decay: float
) -> State:
  """Returns the state after an update; `ema_decay` is the limit of the EMA's decay."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = optimizer.update_ema(state.ema, params, state.update, decay=ema_decay)
  return State(params, ema, opt_state, state.update + 1)


def make_optimizer(
  settings: ConfigDict, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
  """Makes a stage's optimizer: AdamW, whose learning rate is a trapezoid over the updates."""
  schedule = optimizer.make_schedule(
    "trapezoid",
    lr=settings.lr,
    warmup_updates=settings.warmup_updates,
    num_updates=settings.num_updates,
    decay=settings.decay,
  )
  return optimizer.make_optimizer(schedule, weight_decay=weight_decay, clip_norm=clip_norm)


def run_updates(
  config: ConfigDict,
  settings: ConfigDict,
  directory: Path,
  state: Any,
  update: Callable[[Any, np.ndarray], tuple[Any, Mapping[str, jax.Array]]],
  num_rows: int,
  identity: dict[str, str],
  *,
  purpose: int,
) -> Any:
  """Runs a stage's updates, from its newest checkpoint; returns the last state."""
  ckptr = checkpoint.Checkpointer(directory / "checkpoints", keep=2)
  start = 0
  if ckptr.latest_step() is not None:
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = ckptr.restore(abstract)
    start, state = restored.step, restored.state
    if restored.metadata != identity:
      raise UserError(
        f"{directory} was trained on another corpus or from other weights: choose another "
        "--workdir"
      )
  writer = metrics.MetricWriter(
    directory, total_updates=settings.num_updates, start_step=start or None
  )
  since = time.perf_counter()
  unwritten: list[Mapping[str, jax.Array]] = []
  try:
    for done in range(start + 1, settings.num_updates + 1):
      rng = np.random.default_rng([config.seed, purpose, done - 1])
      rows = np.sort(rng.integers(num_rows, size=settings.batch_size))
      state, values = update(state, rows)
      unwritten.append(values)
      if done % config.log_every == 0 or done == settings.num_updates:
        # Means over the interval: the loss of one batch hides a slope over thousands.
        numbers = {name: float(np.mean([v[name] for v in unwritten])) for name in values}
        speed = len(unwritten) * settings.batch_size / (time.perf_counter() - since)
        unwritten, since = [], time.perf_counter()
        writer.write(done, numbers | {"images_per_second": speed})
        writer.progress(done, loss=numbers["loss"], images_per_second=speed, shares={})
      if done % config.save_every == 0 or done == settings.num_updates:
        ckptr.save(done, state, None, identity)
  finally:
    # After an interruption, too: an unfinished checkpoint is completed.
    writer.close()
    ckptr.close()
  return state
