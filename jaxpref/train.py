"""The run: build, restore, then update / log / save, and at the end evaluate.

`prepare` reads and checks all input; `run` has the side effects. The loop is meant to be
read from top to bottom.
"""

import dataclasses
import hashlib
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
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
  optim,
  rollouts,
  runtime,
  sharding,
  steps,
)
from jaxpref import workdir as workdir_lib
from jaxpref.data import encode, experts, loader
from jaxpref.diffusion import grid
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate
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
  pipeline: pipeline_lib.Pipeline
  examples: list[experts.Example]
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
  pipeline = pipeline_lib.load_pipeline(
    config.model.path,
    dtype=jnp.dtype(config.model.dtype),
    mesh=mesh,
    variant=config.model.variant,
  )
  # More steps than the schedule has are refused here, not at the first picture.
  grid.offset_grid(pipeline.schedule, config.rollout.num_steps, jnp.zeros(1, jnp.int32))
  grid.uniform_grid(pipeline.schedule, config.evaluate.num_steps, 1, **pipeline.spacing)
  data = config.data
  examples = experts.load_examples(
    data.source,
    path=data.path,
    num_experts=data.num_experts,
    image_size=pipeline.image_size,
  )
  source = config.evaluate.prompts
  if source == "auto":
    source = "shapes" if data.source == "shapes" else "captions"
  prompts = evaluate.choose_prompts(
    source,
    config.evaluate.num_prompts,
    [e.caption for e in examples],
    seed=config.evaluate.seed,
  )
  usable = evaluate.usable_scorers(config.evaluate.scorers, prompts)
  return Prepared(config, mesh, loss, hyper, pipeline, examples, prompts, usable)


def run(prepared: Prepared, workdir: Path) -> None:
  """Trains from the newest checkpoint in `workdir`, or from the start, then evaluates.

  Raises:
    UserError: a checkpoint cannot be written or is not of this run.
  """
  config, mesh = prepared.config, prepared.mesh
  pipeline, loss, train = prepared.pipeline, prepared.loss, config.train
  began = time.time()

  # Data: encoded once, then only indices are dealt.
  rows = _encode_rows(pipeline, mesh, prepared.examples, flip=config.data.flip)
  num_rows = len(rows["latents"])
  uncond = jax.device_put(encode.encode_no_prompt(pipeline, mesh), sharding.replicated(mesh))
  deal = loader.make_loader(num_rows, batch_size=train.batch_size, seed=config.seed)

  # State: from the base, or from the newest checkpoint.
  base = pipeline.params["unet"]
  tx = _optimizer(config)
  lagging = loss.ROLLOUT and config.rollout.refresh_every > 1
  make_state = lambda params: steps.init_state(params, tx, lagging_copy=lagging)  # noqa: E731
  abstract = jax.eval_shape(make_state, base)
  placement = sharding.params_sharding(mesh, abstract)
  ckptr = checkpoint.open_checkpointer(workdir / "checkpoints", keep=train.keep)
  identity = {
    "jaxpref": __version__,
    "data": _fingerprint(prepared.examples),
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
  ref = base if loss.REFERENCE else None
  # Only now: a continuation that is refused changes nothing.
  workdir_lib.write_config(workdir, config)

  # Programs.
  train_step, rollout = _programs(prepared, tx, placement)

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
        batch = sharding.place_batch(jax.tree.map(lambda x, i=index: x[i], rows), mesh)
      negatives = None
      if loss.ROLLOUT:
        with clock("rollout"):
          policy = state.policy_copy if lagging else state.params
          negatives = rollout(policy, state.update, batch["cond"], uncond)
          jax.block_until_ready(negatives)
      with clock("update"):
        state, values = train_step(state, ref, uncond, batch, negatives)
        jax.block_until_ready(state.update)
      images_since += train.batch_size
      if done % train.log_every == 0 or done == train.num_updates:
        shares, speed = clock.shares(), images_since / clock.elapsed()
        numbers = {name: float(v) for name, v in values.items()}
        times = {f"time/{name}": share for name, share in shares.items()}
        if numbers["optim/grad_norm"] == 0.0 and done < train.num_updates:
          _log.warning(
            "update %d learned nothing, its gradient is 0: see loss.margin, if dro/active is "
            "0 too",
            done,
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
    {"base": base, "tuned": state.ema},
    prepared.prompts,
    config.evaluate,
    scorer_names=prepared.scorers,
    mesh=mesh,
    directory=directory,
  )
  facts = {
    "updates": train.num_updates,
    "training images": num_rows,
    "seed": config.seed,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "versions": f"jaxpref {__version__}, jax {jax.__version__}, numpy {np.__version__}",
    "wall time": f"{time.time() - began:.0f} s, from update {start}",
  }
  held_out = not {e.caption for e in prepared.examples} & set(prepared.prompts)
  evaluate.write_report(workdir, directory, config, evaluated, facts, held_out=held_out)


def _encode_rows(
  pipeline: pipeline_lib.Pipeline,
  mesh: Mesh,
  examples: Sequence[experts.Example],
  *,
  flip: bool,
) -> dict[str, Any]:
  images = [e.image for e in examples]
  captions = [e.caption for e in examples]
  if flip:
    images, captions = images + [i[:, ::-1] for i in images], captions * 2
  return {
    "latents": encode.encode_images(pipeline, mesh, images),
    "cond": encode.encode_prompts(pipeline, mesh, captions),
  }


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
  """The train step and the rollout."""
  config, pipeline = prepared.config, prepared.pipeline
  denoise = unet_lib.make_denoise(pipeline.modules["unet"])
  shared = {"seed": config.seed, "prompt_dropout": config.data.prompt_dropout}
  train_step = steps.make_train_step(
    denoise,
    pipeline.schedule,
    prepared.loss,
    tx,
    mesh=prepared.mesh,
    state_sharding=placement,
    hyper=prepared.hyper,
    ema_decay=config.optim.ema_decay,
    accumulate=config.train.accumulate,
    refresh_every=config.rollout.refresh_every,
    own_targets=(
      prepared.loss.ROLLOUT
      and config.rollout.refresh_every == 1
      and config.rollout.guidance == 1.0
    ),
    **shared,
  )
  rollout = rollouts.make_rollout(
    denoise,
    pipeline.schedule,
    latent_shape=pipeline.latent_shape,
    num_steps=config.rollout.num_steps,
    solver=config.rollout.solver,
    order=config.rollout.order,
    guidance=config.rollout.guidance,
    **shared,
  )
  return train_step, rollout


def _fingerprint(examples: Sequence[experts.Example]) -> str:
  """Changes with any training image or caption."""
  digest = hashlib.sha256()
  for example in examples:
    digest.update(example.caption.encode() + b"\0" + example.image.tobytes())
  return digest.hexdigest()[:16]


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
