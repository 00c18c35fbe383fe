"""The training loop: update, log, save, evaluate.

`jaxpref.training.setup` has read and checked all input; here are the side effects. Read the
loop in `run` from top to bottom. All processes of a run execute it; process 0 writes.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.data import loader as loader_lib
from jaxpref.errors import HackedError, StoppedError, UserError
from jaxpref.models import lora
from jaxpref.runtime import (
  checkpoint,
  distributed,
  jax_setup,
  metrics,
  throughput,
  wandb_run,
  watchdog,
)
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import (
  anomalies,
  batch_maker,
  flops,
  load_run,
  programs,
  run_state,
  step_rows,
)
from jaxpref.training import inputs as inputs_lib
from jaxpref.training.alarms import Alarms
from jaxpref.training.judge_evaluator import JudgeEvaluator
from jaxpref.training.prompt_batches import PromptBatches
from jaxpref.training.rounds import Rounds
from jaxpref.training.run_evaluator import RunEvaluator
from jaxpref.training.setup import Prepared

_AHEAD = 2  # number of updates that the host may be ahead of the devices
_BATCHES_AHEAD = 2  # batches that are read and put on the devices before they are needed


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
    StoppedError: the run was asked to stop, and has saved its state; also a HackedError.
  """
  config, train = prepared.config, prepared.config.train
  began = time.time()
  ckptr = _open_checkpointer(workdir, config)
  uncond, guide = _encode_no_prompt(prepared)
  opened = _open_data(prepared, workdir, ckptr, guide)
  loader, encode_batch, where, add_known_errors, rounds = opened
  _keep_encoders_on_host(prepared)
  identity = run_state.identify(prepared, where)
  program, state, start, base, frozen, reference = run_state.make_run_state(
    prepared, uncond, ckptr, loader, identity
  )
  add_known_errors(program, base, reference, uncond)
  # Only now: a run that may not resume here changes nothing.
  distributed.first(lambda: _write_start(workdir, prepared, identity, start, state.params))
  evaluator = _make_evaluator(prepared, workdir, ckptr, known)
  alarms = Alarms(prepared, workdir)
  evaluator.keep_best()
  models_of = functools.partial(_models_of, program, base)
  writer = _open_writer(workdir, config, start)
  meter, clock = _speedometer(prepared), metrics.Stopwatch()
  profiler = throughput.Profiler(workdir / "profile", first=start + 3, updates=config.profile)
  finite, spikes = anomalies.FiniteCheck(prepared, workdir), anomalies.Spikes()
  pending: collections.deque = collections.deque()  # updates whose metrics are not read yet
  save_is_due = stopping = False
  with contextlib.ExitStack() as at_last:
    # Also after an error, the save under way is finished before the workdir is unlocked.
    at_last.callback(ckptr.close)
    if writer:
      at_last.callback(writer.close)
    at_last.callback(profiler.close)
    at_last.callback(loader.close)
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
      renewal = functools.partial(rounds.renew, program, state, frozen) if rounds else None
      taken, batch = _next_batch(loader, encode_batch, renewal, clock, wait)
      seen = None
      if program.rollout:
        with clock("rollout"):
          seen = program.rollout(
            *programs.rollout_arguments(program, state, frozen, batch["cond"], uncond, guide),
            latent_shape=batch["latents"].shape[2:],
          )
          wait(seen)
      with clock("update"):
        state, values = program.train_step(state, frozen, uncond, batch, seen, reference, guide)
        wait(state)
      looked = alarms.after(done, program.adapt(state.params, frozen), base)
      values = values | (rounds.metrics if rounds else {}) | looked
      meter.add(train.batch_size)
      profiler.after(done, state)
      stopping |= watchdog.beat() or alarms.stops
      save_is_due |= last or stopping or done % train.updates_per_iteration == 0
      pending.append((done, taken, values))
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
      whole = rounds is None or rounds.is_between
      if last or (save_is_due and finite.is_finite and whole):
        save_is_due = False
        ckptr.save(done, state, loader.get_state(), identity)
      if stopping and not last and whole:
        ckptr.wait()
        raise _stopped(alarms, done, train.num_updates, saved=not save_is_due)

  evaluator.evaluate(models_of(state), train.num_updates)
  wall_time = f"{time.time() - began:.0f} s, from update {start}"
  distributed.first(lambda: evaluator.write_report(wall_time))


def _make_evaluator(
  prepared: Prepared, workdir: Path, ckptr: checkpoint.Checkpointer, known: Any
) -> RunEvaluator | JudgeEvaluator:
  if prepared.loss.needs.judges:
    return JudgeEvaluator(prepared, workdir)
  return RunEvaluator(prepared, workdir, ckptr, known)


def _models_of(program: programs.Programs, base: Any, state: Any) -> dict[str, Any]:
  """Returns the parameters that an evaluation compares, for one compiled program."""
  tuned = program.adapt(state.ema, base)
  return {"base": lora.without_additions(base, tuned), "tuned": tuned}


def _stopped(alarms: Alarms, done: int, num_updates: int, *, saved: bool) -> UserError:
  saved_or_not = "saved" if saved else "not saved, it is not finite,"
  where = f"{saved_or_not} after update {done} of {num_updates}"
  if alarms.stops:
    return HackedError(
      f"train.stop_on_hacking: {' '.join(alarms.said)} Stopped, {where}; to go on, give the "
      "same command with --config.train.stop_on_hacking=False"
    )
  return StoppedError(f"asked to stop (SIGTERM), {where}; the same command resumes this run")


def _next_batch(
  loader: Any,
  encode_batch: Callable[[Any], Any],
  renewal: Callable[[], None] | None,
  clock: metrics.Stopwatch,
  wait: Callable[[Any], Any],
) -> tuple[Any, Any]:
  """Returns the next rows and their batch, after the renewal of a round if there is one."""
  if renewal:
    with clock("rollout"):
      renewal()
  with clock("data"):
    taken, batch = next(loader)
    batch = encode_batch(batch)
    wait(batch)
  return taken, batch


class _Data(NamedTuple):
  """The source of batches.

  Attributes:
    loader: endless iterator of rows and batches, with a state.
    encode: from a batch on the devices to a batch of encodings.
    where: where rows are encoded, for the run's identity.
    add_known_errors: see `batch_maker.BatchMaker.add_known_errors`.
    rounds: the loader itself if it serves samples of the policy, else None.
  """

  loader: Any
  encode: Callable[[Any], Any]
  where: str
  add_known_errors: Callable[..., None]
  rounds: Rounds | None


def _open_data(
  prepared: Prepared, workdir: Path, ckptr: checkpoint.Checkpointer, guide: Any
) -> _Data:
  """Opens the run's rows, the rounds that sample them, or the prompts of updates that do."""
  if "rounds" in prepared.config:
    rounds = Rounds(prepared, workdir, guide)
    return _Data(rounds, lambda batch: batch, "rounds", lambda *_: None, rounds)
  if "pathwise" in prepared.config:
    return _Data(
      PromptBatches(prepared, guide), lambda batch: batch, "prompts", lambda *_: None, None
    )
  inputs = inputs_lib.open_rows(prepared, _encoded_before(workdir, ckptr))
  make_batch = batch_maker.BatchMaker(prepared, inputs)
  loader = make_loader(prepared, inputs, make_batch)
  return _Data(loader, inputs.encode, inputs.where, make_batch.add_known_errors, None)


def make_loader(
  prepared: Prepared, inputs: inputs_lib.Inputs, make_batch: batch_maker.BatchMaker
) -> Any:
  """Makes the endless iterator of batches on the devices, each with its rows."""
  data = prepared.config.data
  sizes = [inputs_lib.part_length(part) for part in inputs.parts]
  options = {
    "batch_size": prepared.config.train.batch_size,
    "seed": prepared.config.seed,
    "read": make_batch,
    "ahead": _BATCHES_AHEAD,
  }
  if data.buckets:
    return loader_lib.make_bucket_loader(sizes, **options)
  probabilities = None
  if prepared.loss.needs.rows == "singles":
    desirable = np.asarray(inputs.parts[0].rows["labels"]["desirable"])
    probabilities = loader_lib.probabilities_of(desirable, data.desirable_share)
  return loader_lib.make_loader(sizes[0], probabilities=probabilities, **options)


def _encoded_before(workdir: Path, ckptr: checkpoint.Checkpointer) -> str:
  """Returns where an interrupted run's rows were encoded; '' for a new run."""
  if ckptr.latest_step() is None:
    return ""
  starts = distributed.first(lambda: workdir_lib.read_starts(workdir))
  return str(starts[-1].get("encoded", "")) if starts else ""


def _keep_encoders_on_host(prepared: Prepared) -> None:
  """Moves VAE and text encoders off the devices; evaluations put them there while they run."""
  params = prepared.pipeline.params
  for part in prepared.pipeline.other_params:
    params[part] = sharding.to_host(params[part])


def _encode_no_prompt(prepared: Prepared) -> tuple[Any, Any]:
  """Encodes the dropped prompt and, for guided predictions, the empty prompt."""
  config, pipeline, mesh = prepared.config, prepared.pipeline, prepared.mesh
  dropped = encode.encode_dropped_prompt(pipeline, mesh, config.data.dropped_prompt)
  guide = None
  samples = prepared.loss.needs.rollout or "rounds" in config or "pathwise" in config
  scale = config.rollout.guidance if samples else step_rows.training_guidance(config)
  if pipeline.classifier_free_scale(scale) > 1:
    guide = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  return sharding.replicate(dropped, mesh), guide


def _open_checkpointer(workdir: Path, config: ConfigDict) -> checkpoint.Checkpointer:
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
  count = int(parameter_overview.count_parameters(params))  # a float, if one is a scalar
  print(f"training {count:,} parameters", flush=True)
  workdir_lib.write_config(workdir, prepared.config)
  rows = {"used": len(prepared.rows), **prepared.data.facts()}
  facts = {"after_update": start, **identity, "reference": prepared.reference, "rows": rows}
  facts["learned_from"] = load_run.learned_from(prepared.config)
  workdir_lib.add_start(workdir, facts | jax_setup.facts())


def _open_writer(workdir: Path, config: ConfigDict, start: int) -> metrics.MetricWriter | None:
  """Opens the metrics on process 0. If it cannot write, all processes fail."""
  opened: list[metrics.MetricWriter] = []

  def open_it() -> None:
    wandb = wandb_run.WandbRun(config, workdir) if config.train.wandb else None
    updates, start_step = config.train.num_updates, start or None
    opened.append(
      metrics.MetricWriter(workdir, total_updates=updates, start_step=start_step, wandb=wandb)
    )

  distributed.first(open_it)
  return opened[0] if opened else None


def _speedometer(prepared: Prepared) -> throughput.Speedometer:
  work = flops.of_update(prepared, flops.of_forward(prepared.pipeline))
  return throughput.Speedometer(
    images_per_row=max(len(prepared.arms) - bool(prepared.loss.needs.rollout), 1),
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
