"""The training loop: update, log, save, evaluate.

`jaxpref.training.setup` has read and checked all input; here are the side effects. Read the
loop in `run` from top to bottom. All processes of a run execute it; process 0 writes.
"""

import collections
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.data import loader as loader_lib
from jaxpref.errors import StoppedError
from jaxpref.runtime import checkpoint, distributed, jax_setup, metrics, throughput, watchdog
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import anomalies, batch_maker, flops, programs, run_state
from jaxpref.training.run_evaluator import RunEvaluator
from jaxpref.training.setup import Prepared

_AHEAD = 2  # number of updates that the host may be ahead of the devices


def run(
  prepared: Prepared, workdir: Path, known: Mapping[str, np.ndarray] | None = None
) -> None:
  """Trains from the newest checkpoint in `workdir` or from the start, then evaluates.

  Args:
    prepared: the run's input.
    workdir: the run's own directory.
    known: the base's images for the evaluation under 'base', if another run has sampled them.

  Raises:
    UserError: a checkpoint cannot be written or is of another run.
    DivergedError: too many updates were not finite.
    StoppedError: the run was asked to stop, and has saved its state.
  """
  config, train = prepared.config, prepared.config.train
  began = time.time()
  ckptr = _open_checkpointer(workdir, config)
  rows, uncond, guide = _encode(prepared)
  loader = _make_loader(prepared, rows)
  identity = run_state.identify(prepared)
  program, state, start, base, frozen, reference = run_state.make_run_state(
    prepared, rows, uncond, ckptr, loader, identity
  )
  # Only now: a run that may not resume here changes nothing.
  distributed.first(lambda: _write_start(workdir, prepared, identity, start, state.params))
  evaluator = RunEvaluator(prepared, workdir, ckptr, known)
  evaluator.keep_best()
  make_batch = batch_maker.make_batch_maker(prepared, program, base, reference, uncond, rows)
  models_of = lambda state: {"base": base, "tuned": program.adapt(state.ema, base)}  # noqa: E731

  writer = _open_writer(workdir, train.num_updates, start)
  meter, clock = _speedometer(prepared), metrics.Stopwatch()
  profiler = throughput.Profiler(workdir / "profile", first=start + 3, updates=config.profile)
  finite, spikes = anomalies.FiniteCheck(prepared, rows, workdir), anomalies.Spikes()
  pending: collections.deque = collections.deque()  # updates whose metrics are not read yet
  save_is_due = False
  with contextlib.ExitStack() as at_last:
    # Also after an error, the save under way is finished before the workdir is unlocked.
    at_last.callback(ckptr.close)
    if writer:
      at_last.callback(writer.close)
    at_last.callback(profiler.close)
    # The host runs ahead of the devices, except at logged updates: it waits for each of their
    # phases to time it.
    for done in range(start + 1, train.num_updates + 1):
      if evaluator.is_due(done - 1):
        # Before the next update, so that a resumed run repeats an interrupted evaluation.
        evaluator.evaluate(models_of(state), done - 1)
        meter.reset()
      last = done == train.num_updates
      logged = last or done % train.log_every == 0
      wait = jax.block_until_ready if logged else lambda x: x
      wait(state)
      clock.reset()
      profiler.before(done, state)
      with clock("data"):
        index = next(loader)
        batch = make_batch(index, done)
      states = None
      if program.rollout:
        with clock("rollout"):
          states = program.rollout(
            *programs.rollout_arguments(program, state, frozen, batch["cond"], uncond, guide)
          )
          wait(states)
      with clock("update"):
        state, values = program.train_step(state, frozen, uncond, batch, states, reference)
        wait(state)
      meter.add(train.batch_size)
      profiler.after(done, state)
      stop = watchdog.beat()
      save_is_due |= last or stop or done % train.updates_per_iteration == 0
      pending.append((done, index, values))
      while len(pending) > (0 if logged or save_is_due else _AHEAD):
        finite.check(*pending.popleft())
      if logged:
        spikes.add(done, {name: float(values[name]) for name in ("loss", "optim/grad_norm")})
        _log_update(writer, done, values, meter.measure(), clock.shares(), last=last)
      if done == start + 1:
        jax.block_until_ready(state)
        meter.reset()  # the first update includes compilation
      if last:
        finite.check_at_the_end()
      if last or (save_is_due and finite.is_finite):
        save_is_due = False
        ckptr.save(done, state, loader.get_state(), identity)
      if stop and not last:
        ckptr.wait()
        raise _stopped(done, train.num_updates, saved=not save_is_due)

  evaluator.evaluate(models_of(state), train.num_updates)
  wall_time = f"{time.time() - began:.0f} s, from update {start}"
  distributed.first(lambda: evaluator.write_report(wall_time))


def _stopped(done: int, num_updates: int, *, saved: bool) -> StoppedError:
  saved_or_not = "saved" if saved else "not saved, it is not finite,"
  return StoppedError(
    f"asked to stop (SIGTERM), {saved_or_not} after update {done} of {num_updates}; the "
    "same command resumes this run"
  )


def _make_loader(prepared: Prepared, rows: Any) -> Any:
  """Makes the endless iterator of the rows' indices, one array for each update."""
  data, probabilities = prepared.config.data, None
  if prepared.loss.needs.rows == "singles":
    desirable = rows["labels"]["desirable"]
    probabilities = loader_lib.probabilities_of(desirable, data.desirable_share)
  return loader_lib.make_loader(
    len(rows["latents"]),
    batch_size=prepared.config.train.batch_size,
    seed=prepared.config.seed,
    probabilities=probabilities,
  )


def _encode(prepared: Prepared) -> tuple[Any, Any, Any]:
  """Encodes the rows, the dropped prompt, and, for guided rollouts, the empty prompt."""
  config, pipeline, mesh = prepared.config, prepared.pipeline, prepared.mesh
  rows = encode.encode_rows(
    *(pipeline, mesh, prepared.rows), flip=config.data.flip, latents=config.data.latents
  )
  dropped = encode.encode_dropped_prompt(pipeline, mesh, config.data.dropped_prompt)
  guide = None
  if prepared.loss.needs.rollout and config.rollout.guidance > 1:
    guide = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  return rows, sharding.replicate(dropped, mesh), guide


def _open_checkpointer(workdir: Path, config: Any) -> checkpoint.Checkpointer:
  """Opens the run's checkpoints; outside of its workdir, it checks whose they are."""
  directory = checkpoint.directory_of(workdir, config)
  if not config.train.checkpoints:
    return checkpoint.Checkpointer(directory, keep=config.train.keep)
  return checkpoint.Checkpointer(
    directory, keep=config.train.keep, owner=config, resume_safe=workdir_lib.RESUME_SAFE
  )


def _write_start(
  workdir: Path, prepared: Prepared, identity: dict[str, Any], start: int, params: Any
) -> None:
  """Records this start of the run: configuration, inputs, rows, machine and parameters."""
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  workdir_lib.write_text(workdir / "parameters.txt", f"{table}\n")
  print(f"training {parameter_overview.count_parameters(params):,} parameters", flush=True)
  workdir_lib.write_config(workdir, prepared.config)
  rows = {"used": len(prepared.rows), **prepared.data.facts()}
  facts = {"after_update": start, **identity, "reference": prepared.reference, "rows": rows}
  workdir_lib.add_start(workdir, facts | jax_setup.facts())


def _open_writer(workdir: Path, updates: int, start: int) -> metrics.MetricWriter | None:
  """Opens the metrics on process 0. If it cannot write, all processes fail."""
  opened: list[metrics.MetricWriter] = []
  distributed.first(
    lambda: opened.append(
      metrics.MetricWriter(workdir, total_updates=updates, start_step=start or None)
    )
  )
  return opened[0] if opened else None


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
    anomalies.warn_of_zero_gradient(numbers, done)
  times = {f"time/{name}": share for name, share in shares.items()}
  writer.write(done, {**numbers, **performance, **times})
  writer.progress(
    done,
    loss=numbers["loss"],
    images_per_second=performance["perf/images_per_second"],
    shares=shares,
  )
