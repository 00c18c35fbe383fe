"""The run: build, restore, then update / log / save, and at the end evaluate.

`jaxpref.prepare` has read and checked all input; here are the side effects. The loop is meant
to be read from top to bottom.
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpref import (
  __version__,
  checkpoint,
  metrics,
  noising,
  optim,
  rollouts,
  runtime,
  sharding,
  steps,
)
from jaxpref import workdir as workdir_lib
from jaxpref.data import encode, loader
from jaxpref.data import rows as rows_lib
from jaxpref.errors import DivergedError, UserError
from jaxpref.evaluation import evaluate
from jaxpref.models import lora as lora_lib
from jaxpref.models import unet as unet_lib
from jaxpref.prepare import Prepared, init_trained

_log = logging.getLogger(__name__)


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
  begin = _begin(prepared, base)
  tx = _optimizer(config)
  lagging = steps.needs_copy(loss.NEEDS, config.rollout.refresh_every)
  make_state = lambda trained: steps.init_state(  # noqa: E731
    trained,
    tx,
    seed=config.seed,
    lagging_copy=lagging,
    replay=_init_replay(prepared, rows, uncond),
  )
  abstract = jax.eval_shape(make_state, begin)
  placement = sharding.params_sharding(mesh, abstract)
  ckptr = checkpoint.open_checkpointer(workdir / "checkpoints", keep=train.keep)
  identity = {
    "jaxpref": __version__,
    "data": rows_lib.fingerprint(prepared.rows),
    "pipeline": pipeline.digest,
    "num_updates": train.num_updates,
    **({"start": prepared.start["digest"]} if prepared.start else {}),
  }
  start = 0
  if checkpoint.latest_step(ckptr) is None:
    state = jax.jit(make_state, out_shardings=placement)(begin)
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
  reference = None
  if loss.NEEDS.reference == "start":
    # Additions are few, and rounded only where they meet the base's weights.
    reference = begin if config.lora.rank else unet_lib.freeze(begin, config.model.frozen_dtype)
  del begin  # the state has a copy of it
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
        state, values = train_step(state, frozen, uncond, batch, drawn, reference)
        jax.block_until_ready(state.update)
      images_since += train.batch_size
      if done % train.log_every == 0 or done == train.num_updates:
        shares, speed = clock.shares(), images_since / clock.elapsed()
        numbers = {name: float(v) for name, v in values.items()}
        times = {f"time/{name}": share for name, share in shares.items()}
        if done < train.num_updates:
          _warn_of_nothing(numbers, done)
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

  models = {"base": base, "tuned": adapt(state.ema, base)}
  _evaluate(prepared, models, workdir, f"{time.time() - began:.0f} s, from update {start}")


def _evaluate(prepared: Prepared, models: Any, workdir: Path, wall_time: str) -> None:
  """Base against the averaged weights, and the report."""
  config = prepared.config
  directory = workdir / "evaluation" / str(config.train.num_updates)
  evaluate.evaluate(
    prepared.pipeline,
    models,
    prepared.prompts,
    config.evaluate,
    scorer_names=prepared.scorers,
    mesh=prepared.mesh,
    directory=directory,
    prefix=config.data.good_prefix,
    improve=config.improve if prepared.pipeline.is_improver else None,
  )
  facts = {
    "updates": config.train.num_updates,
    "training rows": f"{len(prepared.rows)} {prepared.loss.NEEDS.rows}",
    "seed": config.seed,
    **runtime.facts(),
    "wall time": wall_time,
  }
  held_out = not {r.caption for r in prepared.rows} & set(prepared.prompts)
  evaluate.write_report(
    workdir,
    directory,
    config,
    facts,
    held_out=held_out,
    improves=prepared.pipeline.is_improver,
  )


def _begin(prepared: Prepared, base: Any) -> Any:
  """What is trained, as it is before the first update."""
  if prepared.start:
    return prepared.start.pop("params")  # taken out, so that it can be freed
  if not prepared.config.lora.rank:
    return base
  return jax.jit(lambda params: init_trained(prepared.config, params))(base)


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
  model = config.model
  denoise = unet_lib.make_denoise(
    pipeline.modules["unet"], attention=model.attention, norm=model.norm, remat=model.remat
  )
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
    own_targets=bool(needs.rollout) and fresh and not config.rollout.replay,
    adapt=_adapter(config),
    prompt_dropout=dropout,
  )
  rollout = None
  if needs.rollout:
    rollout = rollouts.make_rollout(
      *(denoise, pipeline.schedule),
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


def _warn_of_nothing(values: Mapping[str, float], done: int) -> None:
  """Where an update has learned nothing, which nobody wants to wait for."""
  if values["optim/grad_norm"] == 0.0:
    closed = ": every hinge is closed, see loss.margin" if "dro/active" in values else ""
    _log.warning("update %d learned nothing, its gradient is 0%s", done, closed)


def _check_finite(values: Mapping[str, jax.Array], done: int) -> None:
  """Before a save: what has diverged must not take a good checkpoint's place."""
  for name in ("loss", "optim/grad_norm"):
    if not np.isfinite(value := float(values[name])):
      raise DivergedError(
        f"{name} is {value} at update {done}: the run has diverged, which a lower optim.lr "
        "may prevent; nothing of it is saved"
      )


def _check_continues(
  stored: dict[str, Any], identity: dict[str, Any], start: int, config: Any
) -> None:
  things = {
    "data": "training images",
    "pipeline": "base pipeline's weights",
    "start": "weights in model.start",
  }
  for name, thing in things.items():
    if stored.get(name) != identity.get(name):
      raise UserError(f"the {thing} are not those that this workdir's run began with")
  wanted, before = identity["num_updates"], stored["num_updates"]
  if start > wanted:
    raise UserError(f"this workdir's run has done {start} updates, more than {wanted}")
  if wanted != before and config.optim.schedule != "constant":
    raise UserError(
      f"train.num_updates was {before}, now {wanted}: that would bend the "
      f"{config.optim.schedule} schedule of this workdir's run; choose another --workdir"
    )
