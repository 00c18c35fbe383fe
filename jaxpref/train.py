"""The run: build, restore, then update / log / save, and at the end evaluate.

`prepare` reads and checks all input; `run` has the side effects. The loop is meant to be
read from top to bottom.
"""

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpref import (
  __version__,
  checkpoint,
  losses,
  metrics,
  noising,
  optim,
  randomness,
  rollouts,
  runtime,
  sharding,
  steps,
)
from jaxpref import workdir as workdir_lib
from jaxpref.data import encode, loader
from jaxpref.data import rows as rows_lib
from jaxpref.diffusion import grid
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate
from jaxpref.models import lora as lora_lib
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import unet as unet_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run's input, read and checked."""

  config: Any
  mesh: Mesh
  loss: ModuleType
  hyper: dict[str, Any]
  arms: tuple[str, ...]
  pipeline: pipeline_lib.Pipeline
  rows: list[rows_lib.Row]
  prompts: list[str]
  scorers: tuple[str, ...]


def prepare(config: Any) -> Prepared:
  """Everything a run reads.

  Raises:
    UserError: whatever is wrong with it; the workdir has not been touched then.
  """
  runtime.cache_programs()
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
  sharding.check_batch(config.train.batch_size, mesh, accumulate=config.train.accumulate)
  loss = losses.load_loss(config.loss.name)
  hyper = losses.hyper_of(loss, config.loss)
  arms = rows_lib.arms_of(loss.NEEDS.rows, config.data.list_size)
  arms += ("p",) if loss.NEEDS.rollout else ()
  _check_needs(loss.NEEDS, config)
  losses.check_objective(loss, hyper, arms)
  pipeline = pipeline_lib.load_pipeline(
    config.model.path,
    dtype=jnp.dtype(config.model.dtype),
    mesh=mesh,
    variant=config.model.variant,
  )
  # More steps than the schedule has are refused here, not at the first picture.
  grid.offset_grid(pipeline.schedule, config.rollout.num_steps, jnp.zeros(1, jnp.int32))
  grid.uniform_grid(pipeline.schedule, config.evaluate.num_steps, 1, **pipeline.spacing)
  if config.lora.rank:  # a pattern without a match is refused here, too
    jax.eval_shape(lambda p: _init_trained(config, p), pipeline.params["unet"])
  rows = rows_lib.load_rows(
    loss.NEEDS.rows, config.data, image_size=pipeline.image_size, seed=config.seed
  )
  source = config.evaluate.prompts
  if source == "auto":
    source = "shapes" if config.data.source == "shapes" else "captions"
  prompts = evaluate.choose_prompts(
    source,
    config.evaluate.num_prompts,
    [r.caption for r in rows],
    seed=config.evaluate.seed,
  )
  usable = evaluate.usable_scorers(config.evaluate.scorers, prompts)
  return Prepared(config, mesh, loss, hyper, arms, pipeline, rows, prompts, usable)


def run(prepared: Prepared, workdir: Path) -> None:
  """Trains from the newest checkpoint in `workdir`, or from the start, then evaluates.

  Raises:
    UserError: a checkpoint cannot be written or is not of this run.
  """
  config, mesh = prepared.config, prepared.mesh
  pipeline, loss, train = prepared.pipeline, prepared.loss, config.train
  began = time.time()

  # Data: encoded once, then only indices are dealt.
  rows = encode.encode_rows(pipeline, mesh, prepared.rows, flip=config.data.flip)
  num_rows = len(rows["latents"])
  uncond = jax.device_put(encode.encode_no_prompt(pipeline, mesh), sharding.replicated(mesh))
  deal = loader.make_loader(num_rows, batch_size=train.batch_size, seed=config.seed)

  # State: from the base, or from the newest checkpoint.
  base = pipeline.params.pop("unet")  # taken out, so that it can be freed
  tx = _optimizer(config)
  lagging = steps.needs_copy(loss.NEEDS, config.rollout.refresh_every)
  make_state = lambda params: steps.init_state(  # noqa: E731
    _init_trained(config, params),
    tx,
    seed=config.seed,
    lagging_copy=lagging,
    replay=_init_replay(prepared, rows, uncond),
  )
  abstract = jax.eval_shape(make_state, base)
  placement = sharding.params_sharding(mesh, abstract)
  ckptr = checkpoint.open_checkpointer(workdir / "checkpoints", keep=train.keep)
  identity = {
    "jaxpref": __version__,
    "data": rows_lib.fingerprint(prepared.rows),
    "pipeline": pipeline.digest,
    "num_updates": train.num_updates,
  }
  start = 0
  if checkpoint.latest_step(ckptr) is None:
    state = jax.jit(make_state, out_shardings=placement)(base)
  else:
    target = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, placement
    )
    restored = checkpoint.restore(ckptr, target)
    start, state = restored.step, restored.state
    _check_continues(restored.metadata, identity, start, config)
    deal.set_state(restored.data_state)
    _log.warning("continuing after update %d of %d", start, train.num_updates)
  adapt = _adapter(config)
  base = unet_lib.freeze(base, config.model.frozen_dtype)
  frozen = base if config.lora.rank or loss.NEEDS.reference == "base" else None
  # Only now: a continuation that is refused changes nothing.
  workdir_lib.write_config(workdir, config)

  # Programs.
  train_step, rollout, reference_errors = _programs(prepared, tx, placement)
  known = None
  if config.data.noise_draws and loss.NEEDS.reference:
    known = _known_errors(reference_errors, base, uncond, rows, config, mesh)

  # The loop.
  writer = metrics.MetricWriter(
    workdir, total_updates=train.num_updates, start_step=start or None
  )
  clock = metrics.Stopwatch()
  images_since = 0
  try:
    for done in range(start + 1, train.num_updates + 1):
      with clock("data"):
        index = next(deal)
        batch = jax.tree.map(lambda x, i=index: x[i], rows)
        if config.data.noise_draws:
          draw = _draws_of(config, done - 1, len(index))
          batch |= {"row": index.astype(np.int32), "draw": draw}
          if known is not None:
            batch |= {"ref": {arm: of[index, draw] for arm, of in known.items()}}
        batch = sharding.place_batch(batch, mesh)
      drawn = None
      if loss.NEEDS.rollout:
        with clock("rollout"):
          policy = adapt(state.policy_copy if lagging else state.params, frozen)
          drawn = rollout(policy, state.seed, state.update, batch["cond"], uncond)
          jax.block_until_ready(drawn)
      with clock("update"):
        state, values = train_step(state, frozen, uncond, batch, drawn)
        jax.block_until_ready(state.update)
      images_since += train.batch_size
      if done % train.log_every == 0 or done == train.num_updates:
        shares, speed = clock.shares(), images_since / clock.elapsed()
        numbers = {name: float(v) for name, v in values.items()}
        times = {f"time/{name}": share for name, share in shares.items()}
        if numbers["optim/grad_norm"] == 0.0 and done < train.num_updates:
          _log.warning(
            "update %d learned nothing, its gradient is 0%s",
            done,
            ": every hinge is closed, see loss.margin" if "dro/active" in numbers else "",
          )
        writer.write(done, numbers | {"perf/images_per_second": speed} | times)
        writer.progress(done, loss=numbers["loss"], images_per_second=speed, shares=shares)
        images_since = 0
        clock.reset()
      if done % train.updates_per_iteration == 0 or done == train.num_updates:
        with clock("checkpoint"):
          _check_finite(values, done)
          checkpoint.save(ckptr, done, state, deal.get_state(), identity)
  finally:
    # Also after an error: the save under way is finished before the workdir is given up.
    writer.close()
    checkpoint.close(ckptr)

  # The evaluation: base against the averaged weights.
  directory = workdir / "evaluation" / str(train.num_updates)
  evaluated = evaluate.evaluate(
    pipeline,
    {"base": base, "tuned": adapt(state.ema, base)},
    prepared.prompts,
    config.evaluate,
    scorer_names=prepared.scorers,
    mesh=mesh,
    directory=directory,
    prefix=config.data.good_prefix,
  )
  facts = {
    "updates": train.num_updates,
    "training rows": f"{num_rows} {loss.NEEDS.rows}",
    "seed": config.seed,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "versions": f"jaxpref {__version__}, jax {jax.__version__}, numpy {np.__version__}",
    "wall time": f"{time.time() - began:.0f} s, from update {start}",
  }
  held_out = not {r.caption for r in prepared.rows} & set(prepared.prompts)
  evaluate.write_report(workdir, directory, config, evaluated, facts, held_out=held_out)


def _check_needs(needs: losses.Needs, config: Any) -> None:
  """Refuses settings that this loss makes nothing of, rather than ignoring them."""
  rollout, draws = config.rollout, config.data.noise_draws
  if draws and needs.rollout:
    raise UserError("data.noise_draws fixes timesteps and noise, which rollouts draw anew")
  if draws and needs.residuals:
    raise UserError("data.noise_draws keeps errors, and this loss needs predictions")
  if draws and needs.reference and config.model.dtype != "float32":
    raise UserError(
      "data.noise_draws needs model.dtype=float32: errors of a program of their own, rounded "
      "to less, would differ by more than preference margins"
    )
  if needs.rows != "singles" and (config.data.good_prefix or config.data.bad_prefix):
    raise UserError("data.good_prefix and data.bad_prefix are for losses that learn singles")
  if needs.rows == "experts" and config.data.num_rows:
    raise UserError("of experts there are data.num_experts; data.num_rows is for other rows")
  if needs.rollout != "states" and (rollout.states > 1 or rollout.replay):
    raise UserError("rollout.states and rollout.replay are for losses that take states")
  if rollout.states > rollout.num_steps:
    raise UserError(
      f"a trajectory has rollout.num_steps = {rollout.num_steps} states, of which "
      f"rollout.states = {rollout.states} cannot be kept"
    )


def _init_trained(config: Any, base: Any) -> Any:
  """What is trained, before the first update: all parameters, or additions to them."""
  lora = config.lora
  if not lora.rank:
    return base
  key = randomness.key_of(config.seed, "lora", 0)
  return lora_lib.init_lora(base, rank=lora.rank, targets=lora.targets, key=key)


def _adapter(config: Any) -> Callable[[Any, Any], Any]:
  """(what is trained, base) -> the policy's parameters."""
  if not config.lora.rank:
    return lambda trained, base: trained
  scale = config.lora.alpha / config.lora.rank
  return lambda trained, base: lora_lib.Adapted(base, trained, scale)


def _init_replay(prepared: Prepared, rows: Any, uncond: Any) -> Any:
  """The empty buffer of earlier updates' rows, where one is asked for."""
  config, pipeline = prepared.config, prepared.pipeline
  if not config.rollout.replay:
    return None
  count = config.train.batch_size
  batch = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), rows)
  states = jnp.zeros((count, config.rollout.states, *pipeline.latent_shape))
  drawn = rollouts.States(states, states, jnp.zeros(states.shape[:2], jnp.int32))
  shapes = jax.eval_shape(
    lambda *a: noising.make_arms(
      pipeline.schedule, prepared.loss.NEEDS, *a, seed=0, update=0, prompt_dropout=0.0
    ),
    *(batch, drawn, uncond),
  )
  return rollouts.init_replay(shapes, config.rollout.replay)


def _draws_of(config: Any, update: int, rows: int) -> np.ndarray:
  """Which of its fixed draws each row of a batch takes, int32 [B]."""
  rng = np.random.default_rng([config.seed, update])
  return rng.integers(config.data.noise_draws, size=rows, dtype=np.int32)


def _known_errors(
  reference_errors: Callable, base: Any, uncond: Any, rows: Any, config: Any, mesh: Mesh
) -> dict[str, np.ndarray]:
  """The reference's errors by arm on every draw of every row, [N, draws]."""
  count, draws = len(rows["latents"]), config.data.noise_draws
  found = []
  for draw in range(draws):
    numbers = {"row": np.arange(count, dtype=np.int32), "draw": np.full(count, draw, np.int32)}
    found.append(
      encode.in_batches(
        lambda params, batch: reference_errors(params, config.seed, uncond, batch),
        *(base, rows | numbers, config.train.batch_size, mesh),
      )
    )
  return jax.tree.map(lambda *of: np.stack(of, axis=1), *found)


def _optimizer(config: Any) -> optax.GradientTransformation:
  optimizer = config.optim
  schedule = optim.make_schedule(
    optimizer.schedule,
    lr=optimizer.lr,
    warmup_updates=optimizer.warmup_updates,
    num_updates=config.train.num_updates,
  )
  return optim.make_optimizer(
    schedule,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
  )


def _programs(prepared: Prepared, tx: optax.GradientTransformation, placement: Any):
  """The train step, the rollout, and the reference's errors on fixed draws."""
  config, pipeline, needs = prepared.config, prepared.pipeline, prepared.loss.NEEDS
  denoise = unet_lib.make_denoise(pipeline.modules["unet"])
  dropout = config.data.prompt_dropout
  fresh = config.rollout.refresh_every == 1 and config.rollout.guidance == 1.0
  train_step = steps.make_train_step(
    *(denoise, pipeline.schedule, prepared.loss, tx),
    mesh=prepared.mesh,
    state_sharding=placement,
    arms=prepared.arms,
    hyper=prepared.hyper,
    ema_decay=config.optim.ema_decay,
    accumulate=config.train.accumulate,
    refresh_every=config.rollout.refresh_every,
    own_targets=needs.rollout == "states" and fresh and not config.rollout.replay,
    adapt=_adapter(config),
    prompt_dropout=dropout,
  )
  rollout = None
  if needs.rollout:
    rollout = rollouts.make_rollout(
      *(needs.rollout, denoise, pipeline.schedule),
      latent_shape=pipeline.latent_shape,
      num_steps=config.rollout.num_steps,
      solver=config.rollout.solver,
      order=config.rollout.order,
      guidance=config.rollout.guidance,
      states_per_trajectory=config.rollout.states,
      prompt_dropout=dropout,
    )
  reference_errors = steps.make_reference_errors(
    *(denoise, pipeline.schedule, prepared.loss), arms=prepared.arms, prompt_dropout=dropout
  )
  return train_step, rollout, reference_errors


def _check_finite(values: Mapping[str, jax.Array], done: int) -> None:
  """Before a save: what has diverged must not take a good checkpoint's place."""
  for name in ("loss", "optim/grad_norm"):
    if not np.isfinite(value := float(values[name])):
      raise UserError(
        f"{name} is {value} at update {done}: the run has diverged, which a lower optim.lr "
        "may prevent; nothing of it is saved"
      )


def _check_continues(
  stored: dict[str, Any], identity: dict[str, Any], start: int, config: Any
) -> None:
  things = {"data": "training images", "pipeline": "base pipeline's weights"}
  for name, thing in things.items():
    if stored.get(name) != identity[name]:
      raise UserError(f"the {thing} are not those that this workdir's run began with")
  wanted, before = identity["num_updates"], stored["num_updates"]
  if start > wanted:
    raise UserError(f"this workdir's run has done {start} updates, more than {wanted}")
  if wanted != before and config.optim.schedule != "constant":
    raise UserError(
      f"train.num_updates was {before}, now {wanted}: that would bend the "
      f"{config.optim.schedule} schedule of this workdir's run; choose another --workdir"
    )
