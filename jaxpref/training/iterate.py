"""Training on generated pairs: SPIN and iterative DPO.

Each iteration generates losers with the previous model. Its winners are the data's images, or
the losers as an improver improves them. The pairs go into `pairs/<k>/`, and a run like any
other trains on them in `iterations/<k>/`, starting from the previous model. An interrupted run
resumes at the shard, update or evaluation where it stopped. Process 0 inspects the disk and
broadcasts the result.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref import losses
from jaxpref.data import encode, generated_pairs
from jaxpref.data.bad_rows import Tally
from jaxpref.data.row_set import RowSet
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate, sampling
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.runtime import (
  checkpoint,
  checkpoint_files,
  distributed,
  jax_setup,
  metrics,
  progress,
  tfds_store,
  watchdog,
)
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import iterate_report, load_run, train
from jaxpref.training import setup as setup_lib

_ALWAYS_SAFE = (
  *("profile", "train.log_every", "train.keep", "train.max_skipped", "train.hang_minutes"),
  "train.wandb",
)
# Not the base: the iterations' own configurations name it, too.
_MOVABLE = tuple(name for name in workdir_lib.BY_CONTENT if name != "model.path")
# Filters of generated pairs; they may change until an iteration has trained on pairs.
_FILTERS = ("data.min_change", "data.num_rows")
# Other updates or evaluations would make iterations that cannot be compared.
RESUME_SAFE = (
  *(*_ALWAYS_SAFE, *_FILTERS, "iterate.num_iterations"),
  # These paths may change: `_check_inputs` compares their contents.
  *("iterate.improver", *_MOVABLE),
)
# Fields that may change when an iteration's training resumes: the workdir may have moved.
_RESUME_SAFE = (*_ALWAYS_SAFE, *_MOVABLE, "evaluate.prompts")
_log = logging.getLogger(__name__)
_INPUTS = "inputs.json"  # digests of the run's models and data


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run's input, read and checked.

  Attributes:
    config: of the whole run.
    mesh: of the devices that generate.
    rows: captions, with images if the data's images are the winners.
    prompts: of the evaluations.
    inputs: digests of the models and the data.
    data: counts of the rows that were left out, by reason.
    scorers: names of those that can judge the prompts.
  """

  config: ConfigDict
  mesh: Mesh
  rows: RowSet
  prompts: list[str]
  inputs: dict[str, str]
  data: Tally
  scorers: tuple[str, ...]


def prepare(config: ConfigDict) -> Prepared:
  """Reads and checks a run's input before the first pair is generated.

  Raises:
    UserError: a model, the data or a setting is unusable.
  """
  settings = config.iterate
  needs = losses.make_loss(config.loss).needs
  if needs.rows != "pairs" or needs.arms or needs.rollout:
    raise UserError(
      f"iterations generate pairs, but loss {config.loss.name!r} learns from other rows"
    )
  if config.data.num_rows > settings.num_pairs:
    raise UserError(
      f"data.num_rows = {config.data.num_rows} must be at most iterate.num_pairs = "
      f"{settings.num_pairs}, the pairs that an iteration generates"
    )
  _check_data(config.data)
  checked = setup_lib.check(_inner_config(config))
  base = checked.pipeline
  setup_lib.check_steps(base, "iterate.num_steps", settings.num_steps)
  inputs = {"base": base.digest, "start": checked.start.get("digest", "")}
  if settings.winners == "improved":
    inputs["improver"] = _check_improver(config, base, checked.mesh)
  kind = "captions" if settings.winners == "improved" else "experts"
  rows, tally, prompts = setup_lib.read_data(config, kind, image_size=base.image_size)
  # As they would be read from a file with one prompt per line.
  prompts = list(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts))
  evaluate.check_count(len(prompts), config.evaluate.images_per_prompt)
  usable = evaluate.usable_scorers(config.evaluate.scorers, prompts)
  inputs["data"] = rows.digest
  return Prepared(config, checked.mesh, rows, prompts, inputs, tally, usable)


def _check_data(data: ConfigDict) -> None:
  """Refuses settings that only training on the data's own images could use."""
  refused = {
    "crop": data.crop == "random",
    "cache": data.cache == "disk",
    "original_sizes": data.original_sizes,
    "buckets": data.buckets,
  }
  for name, given in refused.items():
    if given:
      raise UserError(f"data.{name} = {data[name]!r} does not apply to generated pairs")


def _check_improver(config: ConfigDict, base: pipeline_lib.Pipeline, mesh: Mesh) -> str:
  """Refuses an improver that does not fit the base; returns its digest."""
  name = config.iterate.improver
  make = "make one with: python -m jaxpref.main --config=improver"
  if not name:
    raise UserError(f"iterate.improver is empty; {make}")
  try:
    improver = _load(config, name, mesh)
  except UserError as error:
    raise UserError(f"iterate.improver: {error}; {make}") from error
  if not improver.is_improver:
    raise UserError(f"iterate.improver: {name} is not an improver; {make}")
  if improver.image_size != base.image_size:
    raise UserError(
      f"iterate.improver: {name} generates {improver.image_size} pixels, the model "
      f"{base.image_size}"
    )
  setup_lib.check_steps(improver, "improve.num_steps", config.improve.num_steps)
  return improver.digest


def _load(config: ConfigDict, name: str, mesh: Mesh) -> pipeline_lib.Pipeline:
  dtype = jnp.dtype(config.model.dtype)
  source = pipeline_lib.source_of(config.model) if name == config.model.path else {}
  return load_run.load(name, dtype=dtype, mesh=mesh, **source)


def run(prepared: Prepared, workdir: Path) -> None:
  """Runs the iterations that are not finished, then writes the report.

  Raises:
    UserError: a file cannot be written or is of another run.
  """
  config = prepared.config
  count = config.iterate.num_iterations
  distributed.first(lambda: _begin(prepared, workdir))
  model = config.model.start or config.model.path
  for k in range(1, count + 1):
    if not distributed.first(functools.partial(iterate_report.is_finished, workdir, config, k)):
      _iterate(prepared, workdir, model, k)
    model = str(workdir / load_run.ITERATIONS / str(k))
    distributed.first(functools.partial(_finish_iteration, prepared, workdir, k))
  held_out = not prepared.rows.has_caption_in(prepared.prompts)
  facts = prepared.data.words()
  distributed.first(
    lambda: iterate_report.write_report(workdir, config, facts, held_out=held_out)
  )


def _begin(prepared: Prepared, workdir: Path) -> None:
  """Checks that the workdir is this run's, and records this start."""
  count = prepared.config.iterate.num_iterations
  if (workdir / load_run.ITERATIONS / str(count + 1)).exists():
    raise UserError(
      f"{workdir} already has iteration {count + 1}, more than iterate.num_iterations = {count}"
    )
  _check_inputs(prepared, workdir)
  _check_filters(prepared.config, workdir)
  workdir_lib.write_config(workdir, prepared.config)
  rows = {"used": len(prepared.rows), **prepared.data.facts()}
  workdir_lib.add_start(workdir, {"inputs": prepared.inputs, "rows": rows, **jax_setup.facts()})


def _check_inputs(prepared: Prepared, workdir: Path) -> None:
  """Refuses to resume with other models or data."""
  file = workdir / _INPUTS
  if file.exists():
    found = workdir_lib.read_json(file, lambda value: isinstance(value, dict))
    if changed := [name for name, d in prepared.inputs.items() if found.get(name) != d]:
      raise UserError(
        f"{workdir} was begun with another {changed[0]}; choose another --workdir"
      )
  workdir_lib.write_json(file, prepared.inputs)


def _check_filters(config: ConfigDict, workdir: Path) -> None:
  """Refuses to resume with other filters: all iterations must leave out the same pairs."""
  if not (workdir / load_run.ITERATIONS / "1" / workdir_lib.CONFIG).exists():
    return
  stored = workdir_lib.read_json(workdir / workdir_lib.CONFIG, _has_filters)
  now = dict(config_lib.leaves(config))
  before = {name: stored["data"][name.removeprefix("data.")] for name in _FILTERS}
  for name in _FILTERS:
    if before[name] != now[name]:
      raise UserError(
        f"{name} was {before[name]}, now {now[name]}, and iteration 1 was trained with that; "
        "choose another --workdir"
      )


def _has_filters(found: Any) -> bool:
  data = found.get("data") if isinstance(found, dict) else None
  names = {name.removeprefix("data.") for name in _FILTERS}
  return isinstance(data, dict) and names <= data.keys()


def _iterate(prepared: Prepared, workdir: Path, model: str, k: int) -> None:
  """Generates pairs with `model` and trains on them."""
  pairs, trained = workdir / load_run.PAIRS / str(k), workdir / load_run.ITERATIONS / str(k)
  prompts = workdir / "prompts.txt"
  if not distributed.first(lambda: generated_pairs.is_finished(pairs)):
    _generate_pairs(prepared, pairs, model, k)
  count = distributed.first(lambda: _begin_training(prepared, pairs, prompts, k))
  config = _inner_config(prepared.config, pairs=pairs, num_rows=count, model=model, k=k)
  if setup_lib.prompts_source(prepared.config) == "captions":
    with config.unlocked():
      config.evaluate.prompts = str(prompts)
  began = time.perf_counter()
  ready = distributed.together(lambda: setup_lib.prepare(config))
  distributed.check_same("inputs", ready.inputs)
  with distributed.open_workdir(trained, config, resume_safe=_RESUME_SAFE) as path:
    train.run(ready, path, _base_images(ready, trained.with_name(str(k - 1))))
  phases = {"train": time.perf_counter() - began}
  distributed.first(lambda: workdir_lib.write_json(trained / iterate_report.PHASES, phases))


def _base_images(ready: setup_lib.Prepared, before: Path) -> dict[str, np.ndarray]:
  """Reads the base's images of the previous evaluation, which would be the same again."""
  config = ready.config
  directory = before / "evaluation" / str(config.train.num_updates)
  read = functools.partial(
    evaluate.read_images, directory, "base", len(ready.prompts), config.evaluate
  )
  there = distributed.first(lambda: read() is not None)
  images = read() if there else None
  return {} if images is None else {"base": images}


def _begin_training(prepared: Prepared, pairs: Path, prompts: Path, k: int) -> int:
  """Writes the evaluation's prompts; returns the number of pairs to train on."""
  config, changes = prepared.config, generated_pairs.changes(pairs)
  if not (count := generated_pairs.count_kept(changes, config.data)):
    raise UserError(f"in {pairs}, {_none_differs(config, changes, k)}")
  print(f"iteration {k} of {config.iterate.num_iterations}", flush=True)
  if setup_lib.prompts_source(prepared.config) == "captions":
    # All iterations use the same prompts, whichever captions their pairs have.
    workdir_lib.write_text(prompts, "\n".join(prepared.prompts) + "\n")
  return count


def _none_differs(config: ConfigDict, changes: np.ndarray, k: int) -> str:
  low, median, high = (f"{x:.3g}" for x in np.quantile(changes, (0, 0.5, 1)))
  if k == 1:
    way_on = "The same command with another --config.data.min_change resumes with these pairs"
  else:
    way_on = "Iteration 1 was trained with it: choose a lower value and another --workdir"
  return (
    f"no pair differs by data.min_change = {config.data.min_change:g} or more: the pairs "
    f"differ by {low} to {high}, median {median}. {way_on}"
  )


def _inner_config(
  config: ConfigDict, *, pairs: Path = Path(), num_rows: int = 0, model: str = "", k: int = 1
) -> ConfigDict:
  """Returns the configuration of an iteration's training."""
  inner = config.copy_and_resolve_references()
  with inner.unlocked():
    del inner.iterate
    inner.name = f"{inner.name}-{k}"
    if model:
      inner.model.start = "" if model == inner.model.path else model
    inner.seed = (inner.seed + 100_003 * k) % 2**31  # other random numbers than in the last
    inner.data.source, inner.data.path, inner.data.num_rows = "online", str(pairs), num_rows
    # The data's own split and shapes do not apply to pairs.
    inner.data.split, inner.data.crop = "train", "center"
    inner.evaluate.prompts = setup_lib.prompts_source(config)
    if inner.train.checkpoints:
      inner.train.checkpoints = f"{inner.train.checkpoints.rstrip('/')}/{k}"
  return inner


def _generate_pairs(prepared: Prepared, directory: Path, model: str, k: int) -> None:
  """Generates the pairs of iteration `k` that are not on disk yet."""
  config, mesh, settings = prepared.config, prepared.mesh, prepared.config.iterate
  policy = _load(config, model, mesh)
  improver = _load(config, settings.improver, mesh) if settings.winners == "improved" else None
  at_once = min(settings.batch_size, settings.num_pairs, settings.shard_size)
  generate = sampling.make_generator(
    policy,
    mesh,
    num_steps=settings.num_steps,
    guidance=settings.guidance,
    batch_size=at_once,
  )
  improve = None
  if improver:
    improve = sampling.make_generator(
      improver,
      mesh,
      num_steps=config.improve.num_steps,
      guidance=config.improve.text_guidance,
      image_guidance=config.improve.image_guidance,
      batch_size=at_once,
    )
  shards = generated_pairs.shards_of(settings.num_pairs, settings.shard_size)
  missing = distributed.first(lambda: generated_pairs.missing(directory, len(shards)))
  rng = np.random.default_rng([config.seed, k])
  order = rng.permutation(len(prepared.rows))
  # The upper half of the seeds: evaluations use the lower half.
  seeds = rng.integers(2**31, 2**32, size=(settings.num_pairs, 2)).astype(np.uint32)
  clock = metrics.Stopwatch()
  with progress.progress_bar(
    total=settings.num_pairs,
    initial=settings.num_pairs - sum(len(shards[i]) for i in missing),
    desc=f"pairs of iteration {k}",
    unit="pair",
  ) as bar:
    for shard in missing:
      index = np.array(shards[shard])
      chosen = [order[i % len(order)] for i in index]
      captions = [prepared.rows.caption_of(i) for i in chosen]
      with clock("generate"):
        cond = encode.encode_prompts(policy, mesh, captions)
        losers = generate(policy.denoiser_params, cond, seeds[index, 1], names=captions)
      if not (improver and improve):
        winners = np.stack([prepared.rows[i].images[0] for i in chosen])
      else:
        with clock("improve"):
          cond = dict(encode.encode_prompts(improver, mesh, captions))
          cond["image"] = encode.encode_images(improver, mesh, list(losers))
          winners = improve(improver.denoiser_params, cond, seeds[index, 0], names=captions)
      with clock("write"):
        worse, better = (
          encode.encode_images(policy, mesh, list(images)) for images in (losers, winners)
        )
        change = np.sqrt(np.mean(np.square(better - worse), axis=(1, 2, 3)))
        if shard == missing[0] and not generated_pairs.count_kept(change, config.data):
          _log.warning("so far %s", _none_differs(config, change, k))
        made = _how_made(config, policy.digest, improver.digest if improver else "")
        columns = (
          _columns(made, int(i), captions[j], winners[j], losers[j], change[j])
          | {"seed_0": int(seeds[i, 0]) if improver else -1, "seed_1": int(seeds[i, 1])}
          for j, i in enumerate(index)
        )
        distributed.first(
          functools.partial(generated_pairs.write_shard, directory, shard, len(shards), columns)
        )
      distributed.first(lambda: _add_phases(directory / iterate_report.PHASES, clock))
      clock.reset()
      bar.update(len(index))
      watchdog.beat_or_stop()
  lengths = [len(shard) for shard in shards]
  description = f"Iteration {k} of {config.name}."
  watchdog.rest()  # until the first update: its programs are compiled before it
  distributed.first(lambda: generated_pairs.finish(directory, lengths, description=description))


def _add_phases(file: Path, clock: metrics.Stopwatch) -> None:
  """Adds the seconds since the last shard to those on disk."""
  before = workdir_lib.read_or_set_aside(file, iterate_report.are_phases, missing={})
  elapsed = clock.elapsed()
  now = {name: share * elapsed for name, share in clock.shares().items()}
  workdir_lib.write_json(file, {name: before.get(name, 0.0) + now[name] for name in now})


def _how_made(config: ConfigDict, policy: str, improver: str) -> dict[str, Any]:
  """Returns the columns that all pairs of an iteration share."""
  return {
    "has_label": True,
    "label_0": 1.0,
    "label_1": 0.0,
    "guidance": config.iterate.guidance,
    "text_guidance": config.improve.text_guidance if improver else 0.0,
    "image_guidance": config.improve.image_guidance if improver else 0.0,
    "num_steps": config.iterate.num_steps,
    "improve_steps": config.improve.num_steps if improver else 0,
    "model_0": improver or "data",
    "model_1": policy,
  }


def _columns(
  made: Mapping[str, Any],
  i: int,
  caption: str,
  winner: np.ndarray,
  loser: np.ndarray,
  change: float,
) -> dict[str, Any]:
  """Returns the columns of a pair for `generated_pairs`, without its seeds."""
  return {
    **made,
    "caption": caption,
    "ranking_id": i,
    "change": change,
    "image_0_uid": f"{i}-winner",
    "image_1_uid": f"{i}-loser",
    "jpg_0": tfds_store.to_png(winner),
    "jpg_1": tfds_store.to_png(loser),
  }


def _finish_iteration(prepared: Prepared, workdir: Path, k: int) -> None:
  # Only the last checkpoint is this iteration's model.
  trained, step = workdir / load_run.ITERATIONS / str(k), prepared.config.train.num_updates
  own = _inner_config(prepared.config, k=k)
  checkpoint_files.find_good(checkpoint.directory_of(trained, own), step=step)
  iterate_report.write_metrics(prepared.config, workdir, k)
