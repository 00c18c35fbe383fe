"""The run: build, restore, then update / log / save, and at the end evaluate.

`jaxpref.training.setup` has read and checked all input; here are the side effects. The loop is
meant to be read from top to bottom. All processes of a run go through it alike; the first
writes.
"""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import __version__, sharding, wording
from jaxpref.data import encode, loader
from jaxpref.errors import StoppedError, UserError
from jaxpref.evaluation import best_checkpoint as best_checkpoint_lib
from jaxpref.evaluation import evaluate
from jaxpref.models import unet as unet_lib
from jaxpref.runtime import (
  checkpoint,
  checkpoint_files,
  distributed,
  jax_setup,
  metrics,
  throughput,
  watchdog,
)
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import anomalies, flops, programs
from jaxpref.training.setup import Prepared, init_trained

_log = logging.getLogger(__name__)
_AHEAD = 2  # updates that the host may be ahead of the devices


def run(
  prepared: Prepared, workdir: Path, known: Mapping[str, np.ndarray] | None = None
) -> None:
  """Trains from the newest checkpoint in `workdir`, or from the start, then evaluates.

  Args:
    prepared: the run's input.
    workdir: which is this run's alone.
    known: the base's pictures for the evaluation, under 'base', where another run has drawn
      them.

  Raises:
    UserError: a checkpoint cannot be written or is not of this run.
    DivergedError: too many updates were not finite.
    StoppedError: it was asked to stop, and has saved what it had.
  """
  config, mesh, train = prepared.config, prepared.mesh, prepared.config.train
  pipeline, needs = prepared.pipeline, prepared.loss.needs
  began = time.time()

  ckptr = _open_checkpointer(workdir, config)

  # Data: encoded once, then only indices are dealt.
  rows = encode.encode_rows(
    *(pipeline, mesh, prepared.rows), flip=config.data.flip, latents=config.data.latents
  )
  uncond, guide = _encode_no_prompts(prepared)
  chances = None
  if needs.rows == "singles":
    share = config.data.desirable_share
    chances = loader.probabilities_of(rows["labels"]["desirable"], share)
  deal = loader.make_loader(
    len(rows["latents"]),
    batch_size=train.batch_size,
    seed=config.seed,
    probabilities=chances,
  )

  # State: from the base, or from the newest checkpoint.
  base = pipeline.params.pop("unet")  # taken out, so that it can be freed
  begin = _begin(prepared, base)
  program = programs.make_programs(prepared, begin, rows, uncond)
  identity = _identify(prepared)
  state, start = _first_state(program, begin, ckptr, deal, identity, config)
  base = unet_lib.freeze(base, config.model.frozen_dtype)
  frozen = base if config.lora.rank or prepared.reference == "base" else None
  reference = None
  if prepared.reference == "start":
    # Additions are few, and rounded only where they meet the base's weights.
    reference = begin if config.lora.rank else unet_lib.freeze(begin, config.model.frozen_dtype)
  del begin  # the state has a copy of it
  # Only now: a continuation that is refused changes nothing.
  distributed.first(lambda: _write_start(workdir, prepared, identity, start))

  _keep_best(prepared, workdir, ckptr)

  # The loop. The host runs ahead of the devices, except at updates that are logged: each of
  # their phases is waited for, so that it can be timed.
  whose = base if reference is None else program.adapt(reference, base)
  make_batch = _batch_maker(prepared, program, whose, uncond, rows)
  writer = _open_writer(workdir, train.num_updates, start)
  meter = _speedometer(prepared)
  clock = metrics.Stopwatch()
  profiler = throughput.Profiler(workdir / "profile", first=start + 3, updates=config.profile)
  under_way: collections.deque = collections.deque()
  due = False  # whether a checkpoint is
  pictures = dict(known or {})  # the base's, drawn once
  finite, spikes = anomalies.Finite(prepared, rows, workdir), anomalies.Spikes()
  with contextlib.ExitStack() as at_last:
    # Also after an error: the save under way is finished before the workdir is given up.
    at_last.callback(ckptr.close)
    if writer:
      at_last.callback(writer.close)
    at_last.callback(profiler.close)
    for done in range(start + 1, train.num_updates + 1):
      if best_checkpoint_lib.is_due(config, done - 1):
        # Here, so that a continuation makes the one that it was stopped in.
        models = {"base": base, "tuned": program.adapt(state.ema, base)}
        _evaluate(prepared, models, workdir, ckptr, done - 1, pictures)
        meter.reset()
      last = done == train.num_updates
      logged = last or done % train.log_every == 0
      wait = jax.block_until_ready if logged else lambda x: x
      wait(state)
      clock.reset()
      profiler.before(done, state)
      with clock("data"):
        index = next(deal)
        batch = make_batch(index, done)
      drawn = None
      if program.rollout:
        with clock("rollout"):
          drawn = program.rollout(
            *programs.rollout_arguments(program, state, frozen, batch["cond"], uncond, guide)
          )
          wait(drawn)
      with clock("update"):
        state, values = program.train_step(state, frozen, uncond, batch, drawn, reference)
        wait(state)
      meter.add(train.batch_size)
      profiler.after(done, state)
      stop = watchdog.beat()
      due = due or last or stop or done % train.updates_per_iteration == 0
      under_way.append((done, index, values))
      while len(under_way) > (0 if logged or due else _AHEAD):
        finite.check(*under_way.popleft())
      if logged:
        _log_update(writer, done, values, meter.measure(), clock.shares(), last=last)
        spikes.add(done, {name: float(values[name]) for name in ("loss", "optim/grad_norm")})
      if done == start + 1:
        jax.block_until_ready(state)
        meter.reset()  # until now programs were compiled
      if last:
        finite.check_at_the_end()
      if last or (due and finite.is_well):
        due = False
        ckptr.save(done, state, deal.get_state(), identity)
      if stop and not last:
        ckptr.wait()
        saved = "not saved, it is not finite," if due else "saved"
        raise StoppedError(
          f"asked to stop (SIGTERM), {saved} after update {done} of {train.num_updates}; the "
          "same command continues this run"
        )

  models = {"base": base, "tuned": program.adapt(state.ema, base)}
  _evaluate(prepared, models, workdir, ckptr, train.num_updates, pictures)
  wall_time = f"{time.time() - began:.0f} s, from update {start}"
  distributed.first(lambda: _report(prepared, workdir, wall_time))


def _evaluate(
  prepared: Prepared,
  models: Any,
  workdir: Path,
  ckptr: Any,
  done: int,
  pictures: dict[str, np.ndarray],
) -> None:
  """Base against the averaged weights after so many updates; and which of all is best."""
  config, last = prepared.config, done == prepared.config.train.num_updates
  directory = workdir / "evaluation" / str(done)
  settings = _settings(prepared)
  if last or not distributed.first(lambda: best_checkpoint_lib.is_made(directory, settings)):
    drawn = evaluate.evaluate(
      prepared.pipeline,
      models,
      prepared.prompts,
      config.evaluate,
      scorer_names=prepared.scorers,
      mesh=prepared.mesh,
      directory=directory,
      prefix=config.data.good_prefix,
      improve=config.improve if prepared.pipeline.is_improver else None,
      known=pictures,
    )
    pictures |= {"base": drawn["base"]}
    distributed.first(lambda: best_checkpoint_lib.write_settings(directory, settings))
  ckptr.wait()  # only what is whole can be best
  _keep_best(prepared, workdir, ckptr)


def _settings(prepared: Prepared) -> dict[str, Any]:
  return best_checkpoint_lib.settings_of(prepared.config, prepared.prompts, prepared.scorers)


def _keep_best(prepared: Prepared, workdir: Path, ckptr: Any) -> None:
  """Notes which evaluated checkpoint is best, where there are several; that one stays."""
  if not prepared.config.evaluate.every:
    return

  settings = _settings(prepared)

  def find() -> int | None:
    saved = checkpoint_files.steps(ckptr.directory)
    if (best := best_checkpoint_lib.find(workdir, settings, saved)) is None:
      return None
    best_checkpoint_lib.write(workdir, best)
    print(f"best so far by {best.scorer}: update {best.update}, {best.mean:.4f}", flush=True)
    return best.update

  if (best := distributed.first(find)) is not None:
    ckptr.protect(best)


def _report(prepared: Prepared, workdir: Path, wall_time: str) -> None:
  config = prepared.config
  whose = {"start": config.model.start, "base": config.model.path}
  facts = {
    "updates": config.train.num_updates,
    **({"reference": whose[prepared.reference]} if prepared.reference else {}),
    "training rows": f"{len(prepared.rows)} {prepared.loss.needs.rows}",
    **prepared.data.words(),
    "seed": config.seed,
    **jax_setup.facts(),
    "wall time": wall_time,
  }
  if config.evaluate.every:
    saved = checkpoint_files.steps(checkpoint.directory_of(workdir, config))
    if best := best_checkpoint_lib.find(workdir, _settings(prepared), saved):
      facts["best checkpoint"] = f"update {best.update} by {best.scorer}, {best.mean:.4f}"
  evaluate.write_report(
    workdir,
    workdir / "evaluation" / str(config.train.num_updates),
    config,
    facts,
    held_out=not {r.caption for r in prepared.rows} & set(prepared.prompts),
    improves=prepared.pipeline.is_improver,
  )


def _encode_no_prompts(prepared: Prepared) -> tuple[Any, Any]:
  """The dropped prompt, and what a rollout's guidance leads away from, or None."""
  config, pipeline, mesh = prepared.config, prepared.pipeline, prepared.mesh
  dropped = encode.encode_dropped_prompt(pipeline, mesh, config.data.dropped_prompt)
  guide = None
  if prepared.loss.needs.rollout and config.rollout.guidance > 1:
    guide = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  return sharding.replicate(dropped, mesh), guide


def _begin(prepared: Prepared, base: Any) -> Any:
  """What is trained, as it is before the first update."""
  if prepared.start:
    return prepared.start.pop("params")  # taken out, so that it can be freed
  if not prepared.config.lora.rank:
    return base
  return jax.jit(lambda params: init_trained(prepared.config, params))(base)


def _identify(prepared: Prepared) -> dict[str, Any]:
  """What a checkpoint says of its run, for a continuation to compare."""
  return {
    "jaxpref": __version__,
    "num_updates": prepared.config.train.num_updates,
    **prepared.inputs,
  }


def _first_state(
  program: programs.Programs,
  begin: Any,
  ckptr: Any,
  deal: Any,
  identity: dict[str, Any],
  config: Any,
) -> tuple[Any, int]:
  """The state to go on from and the updates done; puts `deal` where it was then."""
  if ckptr.latest_step() is None:
    return jax.jit(program.make_state, out_shardings=program.placement)(begin), 0
  target = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    jax.eval_shape(program.make_state, begin),
    program.placement,
  )
  restored = ckptr.restore(target)
  _check_continues(restored.metadata, identity, restored.step, config)
  deal.set_state(restored.data_state)
  _log.warning("continuing after update %d of %d", restored.step, identity["num_updates"])
  return restored.state, restored.step


def _open_checkpointer(workdir: Path, config: Any) -> checkpoint.Checkpointer:
  """The run's checkpoints; elsewhere than in the workdir they must not be another run's."""
  directory = checkpoint.directory_of(workdir, config)
  if not config.train.checkpoints:
    return checkpoint.Checkpointer(directory, keep=config.train.keep)
  return checkpoint.Checkpointer(
    directory, keep=config.train.keep, owner=config, resume_safe=workdir_lib.RESUME_SAFE
  )


def _write_start(
  workdir: Path, prepared: Prepared, identity: dict[str, Any], start: int
) -> None:
  workdir_lib.write_config(workdir, prepared.config)
  rows = {"used": len(prepared.rows), **prepared.data.facts()}
  facts = {"after_update": start, **identity, "reference": prepared.reference, "rows": rows}
  workdir_lib.add_start(workdir, facts | jax_setup.facts())


def _open_writer(workdir: Path, updates: int, start: int) -> metrics.MetricWriter | None:
  """On process 0; where it cannot write, all fail."""
  opened: list[metrics.MetricWriter] = []
  distributed.first(
    lambda: opened.append(
      metrics.MetricWriter(workdir, total_updates=updates, start_step=start or None)
    )
  )
  return opened[0] if opened else None


def _batch_maker(
  prepared: Prepared, program: programs.Programs, reference: Any, uncond: Any, rows: Any
) -> Callable[[np.ndarray, int], Any]:
  """(indices of rows, number of the update) -> a batch on the devices."""
  config, mesh = prepared.config, prepared.mesh
  draws = config.data.noise_draws
  known: dict[str, np.ndarray] = {}
  if draws and prepared.loss.needs.reference:
    known = _known_errors(program.reference_errors, reference, uncond, rows, config, mesh)

  def make(index: np.ndarray, done: int) -> Any:
    batch = sharding.place_batch(rows, mesh, index)
    if draws:
      rng = np.random.default_rng([config.seed, done - 1])
      draw = rng.integers(draws, size=len(index), dtype=np.int32)
      ref = {arm: of[index, draw] for arm, of in known.items()}
      drawn = {"row": index.astype(np.int32), "draw": draw, "ref": ref}
      batch |= sharding.place_batch(drawn, mesh)
    return batch

  return make


def _known_errors(
  reference_errors: Callable, reference: Any, uncond: Any, rows: Any, config: Any, mesh: Mesh
) -> dict[str, np.ndarray]:
  """The reference's errors by arm on every draw of every row, [N, draws]."""
  count, draws = len(rows["latents"]), config.data.noise_draws
  found = []
  for draw in range(draws):
    numbers = {"row": np.arange(count, dtype=np.int32), "draw": np.full(count, draw, np.int32)}
    found.append(
      encode.in_batches(
        lambda params, batch: reference_errors(params, config.seed, uncond, batch),
        *(reference, rows | numbers, config.train.batch_size, mesh),
      )
    )
  return jax.tree.map(lambda *of: np.stack(of, axis=1), *found)


def _speedometer(prepared: Prepared) -> throughput.Speedometer:
  work = flops.of_update(prepared, flops.of_forward(prepared.pipeline))
  return throughput.Speedometer(
    images_per_row=len(prepared.arms) - bool(prepared.loss.needs.rollout),
    flops_per_row=sum(work.values()) / prepared.config.train.batch_size,
  )


def _log_update(
  writer: metrics.MetricWriter | None,
  done: int,
  values: Mapping[str, jax.Array],
  performance: Mapping[str, float],
  shares: Mapping[str, float],
  *,
  last: bool,
) -> None:
  numbers = {name: float(v) for name, v in values.items()}
  if writer is None:
    return
  if not last:
    anomalies.warn_of_nothing(numbers, done)
  times = {f"time/{name}": share for name, share in shares.items()}
  writer.write(done, {**numbers, **performance, **times})
  writer.progress(
    done,
    loss=numbers["loss"],
    images_per_second=performance["perf/images_per_second"],
    shares=shares,
  )


def _check_continues(
  stored: dict[str, Any], identity: dict[str, Any], start: int, config: Any
) -> None:
  named = {"data": config.data.path, "pipeline": config.model.path, "start": config.model.start}
  things = {
    "data": "training images",
    "pipeline": "base pipeline's weights",
    "start": "weights in model.start",
  }
  for name, thing in things.items():
    if stored.get(name) != identity.get(name):
      where = f" ({named[name]})" if named[name] else ""
      raise UserError(
        f"the {thing}{where} are not those that this workdir's run began with; name those, or "
        "choose another --workdir"
      )
  wanted, before = identity["num_updates"], stored["num_updates"]
  if start > wanted:
    raise UserError(
      f"this workdir's run has done {wording.count(start, 'update')}, more than {wanted}"
    )
  if wanted != before and config.optim.schedule != "constant":
    raise UserError(
      f"train.num_updates was {before}, now {wanted}: that would bend the "
      f"{config.optim.schedule} schedule of this workdir's run; choose another --workdir"
    )
