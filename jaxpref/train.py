"""The run: build, restore, then update / log / save, and at the end evaluate.

`prepare` reads and checks all input; `run` has the side effects. The loop is meant to be
read from top to bottom.
"""

import dataclasses
import logging
import os
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref import (
  __version__,
  checkpoint,
  losses,
  metrics,
  optim,
  rollouts,
  scorers,
  sharding,
  steps,
)
from jaxpref.data import encode, experts, loader
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


def prepare(config: Any) -> Prepared:
  """Everything a run reads.

  Raises:
    UserError: whatever is wrong with it; nothing has been written then.
  """
  cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxpref" / "jax"
  jax.config.update("jax_compilation_cache_dir", str(cache))
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
  sharding.check_batch(config.train.batch_size, config.train.accumulate, mesh)
  loss = losses.load_loss(config.loss.name)
  hyper = {name: config.loss[name] for name in loss.HYPER}
  pipeline = pipeline_lib.load_pipeline(config.model.path, dtype=jnp.dtype(config.model.dtype))
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
  captions = [e.caption for e in examples]
  prompts = evaluate.choose_prompts(
    source, config.evaluate.num_prompts, captions, seed=config.evaluate.seed
  )
  if source != "shapes":
    # The shapes world's scorers know no other prompts.
    kept = [s for s in config.evaluate.scorers if not s.startswith("shapes.")]
    with config.unlocked():
      config.evaluate.scorers = tuple(kept)
  scorers.load_scorers(config.evaluate.scorers)
  return Prepared(config, mesh, loss, hyper, pipeline, examples, prompts)


def run(prepared: Prepared, workdir: Path) -> None:
  """Trains from the newest checkpoint in `workdir`, or from the start, then evaluates."""
  config, mesh = prepared.config, prepared.mesh
  pipeline, loss = prepared.pipeline, prepared.loss
  began = time.time()
  optimizer, train = config.optim, config.train

  # Data: encoded once, then only indices are dealt.
  images = [e.image for e in prepared.examples]
  captions = [e.caption for e in prepared.examples]
  if config.data.flip:
    images, captions = images + [i[:, ::-1] for i in images], captions * 2
  rows = {
    "latents": encode.encode_images(pipeline, images),
    "cond": encode.encode_prompts(pipeline, captions),
  }
  empty_cond = jax.device_put(encode.encode_prompts(pipeline, [""]), sharding.replicated(mesh))
  deal = loader.make_loader(
    len(images),
    batch_size=train.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )

  # Programs.
  denoise = unet_lib.make_denoise(pipeline.modules["unet"])
  tx = optim.make_optimizer(
    optim.make_schedule(
      optimizer.schedule,
      lr=optimizer.lr,
      warmup_updates=optimizer.warmup_updates,
      num_updates=train.num_updates,
    ),
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
  )
  train_step = steps.make_train_step(
    denoise,
    pipeline.schedule,
    loss,
    tx,
    mesh=mesh,
    seed=config.seed,
    hyper=prepared.hyper,
    ema_decay=optimizer.ema_decay,
    prompt_dropout=config.data.prompt_dropout,
    accumulate=train.accumulate,
    refresh_every=config.rollout.refresh_every,
  )
  rollout = rollouts.make_rollout(
    denoise,
    pipeline.schedule,
    seed=config.seed,
    num_steps=config.rollout.num_steps,
    solver=config.rollout.solver,
    order=config.rollout.order,
    guidance=config.rollout.guidance,
    prompt_dropout=config.data.prompt_dropout,
  )

  # State: from the base, or from the newest checkpoint.
  base_params = pipeline.params["unet"]
  params = jax.device_put(base_params, sharding.params_sharding(mesh, base_params))
  lagging = loss.ROLLOUT and config.rollout.refresh_every > 1
  make_state = lambda p: steps.init_state(p, tx, lagging_copy=lagging)  # noqa: E731
  abstract = jax.eval_shape(make_state, params)
  shardings = sharding.params_sharding(mesh, abstract)
  state = jax.jit(make_state, out_shardings=shardings)(params)
  ref = params if loss.REFERENCE else None
  ckptr = checkpoint.open_checkpointer(workdir / "checkpoints", keep=train.keep)
  start = 0
  if checkpoint.latest_step(ckptr) is not None:
    target = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    restored = checkpoint.restore(ckptr, target)
    start, state = restored.step, restored.state
    deal.set_state(restored.data_state)
    _log.warning("continuing after update %d of %d", start, train.num_updates)

  # The loop.
  writer = metrics.MetricWriter(
    workdir, total_updates=train.num_updates, start_step=start or None
  )
  clock = metrics.Stopwatch()
  images_since = 0
  for done in range(start + 1, train.num_updates + 1):
    logged = done % train.log_every == 0 or done == train.num_updates
    with clock("data"):
      index = next(deal)
      batch = sharding.place_batch({k: v[index] for k, v in rows.items()}, mesh)
    negatives = None
    if loss.ROLLOUT:
      with clock("rollout"):
        policy = state.policy_copy if lagging else state.params
        negatives = rollout(policy, state.update, batch["cond"], empty_cond, batch["latents"])
        jax.block_until_ready(negatives)
    with clock("update"):
      state, values = train_step(state, ref, empty_cond, batch, negatives)
      jax.block_until_ready(state.update)
    images_since += train.batch_size
    if logged:
      shares, seconds = clock.shares(), clock.elapsed()
      values = {name: float(v) for name, v in values.items()}
      speed = images_since / seconds
      writer.write(
        done,
        values
        | {"perf/images_per_second": speed}
        | {f"time/{name}": share for name, share in shares.items()},
      )
      writer.progress(done, loss=values["loss"], images_per_second=speed, shares=shares)
      images_since = 0
      clock.reset()
    if done % train.updates_per_iteration == 0 or done == train.num_updates:
      with clock("checkpoint"):
        checkpoint.save(ckptr, done, state, deal.get_state(), {"jaxpref": __version__})
  writer.close()
  checkpoint.close(ckptr)

  # The evaluation: base against the averaged weights.
  directory = workdir / "evaluation" / str(train.num_updates)
  evaluated = evaluate.evaluate(
    pipeline,
    {"base": params, "tuned": state.ema},
    prepared.prompts,
    config.evaluate,
    mesh=mesh,
    directory=directory,
  )
  facts = {
    "updates": train.num_updates,
    "training images": len(images),
    "seed": config.seed,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "versions": f"jaxpref {__version__}, jax {jax.__version__}, numpy {np.__version__}",
    "this session": f"{time.time() - began:.0f} s from update {start}",
  }
  evaluate.write_report(workdir, directory, config, evaluated, facts)
