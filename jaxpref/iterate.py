"""Training on pairs that the model itself has drawn: SPIN and iterative DPO.

Each iteration draws losers with the model before it, takes for winners the data's images or
what an improver makes of the losers, writes the pairs into `pairs/<k>/`, and trains on them in
`iterations/<k>/`, a run like any other, which begins with the model before it. What is on disk
is not made again: an interrupted run goes on at the shard, the update or the evaluation
where it stopped.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import losses, metrics, progress, runtime, sharding, train, tuned
from jaxpref import prepare as prepare_lib
from jaxpref import workdir as workdir_lib
from jaxpref.data import encode, online
from jaxpref.data import rows as rows_lib
from jaxpref.data.shapes import store
from jaxpref.errors import UserError
from jaxpref.evaluation import compare, evaluate, generate
from jaxpref.models import pipeline as pipeline_lib

# Another number of updates would train every iteration on, from a model that has changed.
RESUME_SAFE = ("evaluate", "train.log_every", "train.keep", "iterate.num_iterations")
# What an iteration's training may find changed when it goes on: the workdir may have moved.
_RESUME_SAFE = (*workdir_lib.RESUME_SAFE, "data.path", "model.start", "evaluate.prompts")
_GALLERY = 12
# Seconds of an iteration's phases, in the process that ended it; written last.
_PHASES = "phases.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A run's input, read and checked.

  Attributes:
    config: of the whole run.
    mesh: to draw on.
    rows: prompts, and images where those are the winners.
    prompts: of the evaluations.
  """

  config: ConfigDict
  mesh: Mesh
  rows: list[rows_lib.Row]
  prompts: list[str]


def prepare(config: ConfigDict) -> Prepared:
  """Everything that can be known to be wrong before the first pair is drawn.

  Raises:
    UserError: it is.
  """
  runtime.cache_programs()
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
  sharding.check_batch(config.train.batch_size, mesh, accumulate=config.train.accumulate)
  loss = losses.load_loss(config.loss.name)
  if loss.NEEDS.rows != "pairs":
    raise UserError(f"iterations draw pairs; {config.loss.name!r} learns from other rows")
  losses.check_objective(loss, losses.hyper_of(loss, config.loss), ("w", "l"))
  settings = config.iterate
  image_size = _load(config, config.model.path, mesh).image_size
  if config.model.start:
    _load(config, config.model.start, mesh)
  if settings.winners == "improved":
    if not settings.improver:
      raise UserError(
        "iterate.improver names none; make one with: "
        "python -m jaxpref.main --config=configs/improver.py"
      )
    improver = _load(config, settings.improver, mesh)
    if not improver.is_improver:
      raise UserError(f"iterate.improver: {settings.improver} is no improver")
    if improver.image_size != image_size:
      raise UserError(
        f"iterate.improver: {settings.improver} draws {improver.image_size} pixels, the model "
        f"{image_size}"
      )
  rows = rows_lib.load_rows("experts", config.data, image_size=image_size, seed=config.seed)
  prompts = evaluate.choose_prompts(
    prepare_lib.prompts_source(config),
    config.evaluate.num_prompts,
    [row.caption for row in rows],
    seed=config.evaluate.seed,
  )
  return Prepared(config, mesh, rows, prompts)


def _load(config: ConfigDict, name: str, mesh: Mesh) -> pipeline_lib.Pipeline:
  dtype = jnp.dtype(config.model.dtype)
  variant = config.model.variant if name == config.model.path else ""
  return tuned.load(name, dtype=dtype, mesh=mesh, variant=variant)


def run(prepared: Prepared, workdir: Path) -> None:
  """All iterations, from where they stopped, and the report.

  Raises:
    UserError: something cannot be written, or is of another run.
  """
  config = prepared.config
  workdir_lib.write_config(workdir, config)
  model = config.model.start or config.model.path
  for k in range(1, config.iterate.num_iterations + 1):
    directory, trained = workdir / tuned.PAIRS / str(k), workdir / tuned.ITERATIONS / str(k)
    began = time.perf_counter()
    if not online.is_finished(directory):
      _draw_pairs(prepared, directory, model, k)
    drawn = time.perf_counter()
    if not (trained / _PHASES).exists():
      if not _trained_on(directory):
        raise UserError(f"no pair in {directory} differs by iterate.min_change or more")
      print(f"iteration {k} of {config.iterate.num_iterations}", flush=True)
      inner = _inner_config(prepared, workdir, directory, model, k)
      ready = prepare_lib.prepare(inner)
      opened = workdir_lib.open_workdir(trained, inner, resume_safe=_RESUME_SAFE)
      try:
        train.run(ready, opened.path)
      finally:
        workdir_lib.release(opened)
      parts = {"generate": drawn - began, "train": time.perf_counter() - drawn}
      workdir_lib.write_json(trained / _PHASES, parts)
    model = str(trained)
  _report(prepared, workdir)


def _trained_on(directory: Path) -> int:
  """How many of the pairs are no ties."""
  source = online.open_pairs(directory)
  return sum(
    row["label_0"] != row["label_1"] for row in map(source.__getitem__, range(len(source)))
  )


def _inner_config(
  prepared: Prepared, workdir: Path, pairs: Path, model: str, k: int
) -> ConfigDict:
  """The configuration of an iteration's training."""
  inner = prepared.config.copy_and_resolve_references()
  with inner.unlocked():
    del inner.iterate
    inner.name = f"{inner.name}-{k}"
    inner.model.start = "" if model == inner.model.path else model
    inner.seed = (inner.seed + 100_003 * k) % 2**31  # else its draws were those of the last
    inner.data.source, inner.data.path = "online", str(pairs)
    if prepare_lib.prompts_source(prepared.config) == "captions":
      # The same for all, whichever captions an iteration's pairs have.
      file = workdir / "prompts.txt"
      workdir_lib.write_text(file, "\n".join(prepared.prompts) + "\n")
      inner.evaluate.prompts = str(file)
    else:
      inner.evaluate.prompts = prepare_lib.prompts_source(prepared.config)
  return inner


def _draw_pairs(prepared: Prepared, directory: Path, model: str, k: int) -> None:
  """The pairs of iteration `k` that are not on disk yet, drawn by `model`."""
  config, mesh, settings = prepared.config, prepared.mesh, prepared.config.iterate
  policy = _load(config, model, mesh)
  improver = _load(config, settings.improver, mesh) if settings.winners == "improved" else None
  made_with = {
    "policy": policy.digest,
    "improver": improver.digest if improver else "",
    "data": rows_lib.fingerprint(prepared.rows),
  }
  record = directory / "made_with.json"
  if record.exists() and (found := json.loads(record.read_text())) != made_with:
    other = next(name for name in made_with if found.get(name) != made_with[name])
    raise UserError(f"{directory} holds pairs of another {other}; remove it to draw them anew")
  workdir_lib.write_json(record, made_with)
  draw = generate.make_generator(
    policy,
    mesh,
    num_steps=settings.num_steps,
    guidance=settings.guidance,
    batch_size=settings.batch_size,
  )
  improve = None
  if improver:
    improve = generate.make_generator(
      improver,
      mesh,
      num_steps=config.improve.num_steps,
      guidance=config.improve.text_guidance,
      image_guidance=config.improve.image_guidance,
      batch_size=settings.batch_size,
    )
  shards = online.shards_of(settings.num_pairs, settings.shard_size)
  missing = online.missing(directory, len(shards))
  rng = np.random.default_rng([config.seed, k])
  order = rng.permutation(len(prepared.rows))
  # The upper half of the seeds: evaluations take theirs from the lower.
  seeds = rng.integers(2**31, 2**32, size=(settings.num_pairs, 2)).astype(np.uint32)
  with progress.progress_bar(
    total=settings.num_pairs,
    initial=settings.num_pairs - sum(len(shards[i]) for i in missing),
    desc=f"pairs of iteration {k}",
    unit="pair",
  ) as bar:
    for shard in missing:
      index = np.array(shards[shard])
      rows = [prepared.rows[order[i % len(order)]] for i in index]
      captions = [row.caption for row in rows]
      cond = encode.encode_prompts(policy, mesh, captions)
      losers = draw(policy.params["unet"], cond, seeds[index, 1])
      latents = encode.encode_images(policy, mesh, list(losers))
      if improver and improve:
        told = {**encode.encode_prompts(improver, mesh, captions), "image": latents}
        winners = improve(improver.params["unet"], told, seeds[index, 0])
      else:
        winners = np.stack([row.images[0] for row in rows])
      better = encode.encode_images(policy, mesh, list(winners))
      change = np.sqrt(np.mean(np.square(better - latents), axis=(1, 2, 3)))
      online.write_shard(
        *(directory, shard, len(shards)),
        [
          _columns(config, made_with, int(i), captions[j], winners[j], losers[j], change[j])
          | {"seed_0": int(seeds[i, 0]) if improver else -1, "seed_1": int(seeds[i, 1])}
          for j, i in enumerate(index)
        ],
      )
      bar.update(len(index))
  lengths = [len(shard) for shard in shards]
  online.finish(directory, lengths, description=f"Iteration {k} of {config.name}.")


def _columns(
  config: ConfigDict,
  made_with: Mapping[str, str],
  i: int,
  caption: str,
  winner: np.ndarray,
  loser: np.ndarray,
  change: float,
) -> dict[str, Any]:
  """A pair as `data.online` stores it, all but its seeds."""
  settings, improved = config.iterate, bool(made_with["improver"])
  differ = change >= settings.min_change
  return {
    "caption": caption,
    "has_label": True,
    "ranking_id": i,
    "change": change,
    "guidance": settings.guidance,
    "text_guidance": config.improve.text_guidance if improved else 0.0,
    "image_guidance": config.improve.image_guidance if improved else 0.0,
    "num_steps": settings.num_steps,
    "image_0_uid": f"{i}-winner",
    "image_1_uid": f"{i}-loser",
    "jpg_0": store.png(winner),
    "jpg_1": store.png(loser),
    "label_0": 1.0 if differ else 0.5,
    "label_1": 0.0 if differ else 0.5,
    "model_0": made_with["improver"] or "data",
    "model_1": made_with["policy"],
  }


def _report(prepared: Prepared, workdir: Path) -> None:
  """The last iteration's evaluation, with all iterations' curves and some of the pairs."""
  config = prepared.config
  count, updates = config.iterate.num_iterations, config.train.num_updates
  curves: dict[str, list[tuple[float, float]]] = {}
  table = []
  for k in range(1, count + 1):
    trained = workdir / tuned.ITERATIONS / str(k)
    for name, points in metrics.read_curves(trained).items():
      shifted = [(step + (k - 1) * updates, value) for step, value in points]
      curves.setdefault(name, []).extend(shifted)
    table.append(_summary(workdir, k, updates))
  last = workdir / tuned.ITERATIONS / str(count)
  facts = {
    "iterations": count,
    "updates in each": updates,
    "pairs drawn in each": config.iterate.num_pairs,
    "seed": config.seed,
    **runtime.facts(),
  }
  evaluate.write_report(
    workdir,
    last / "evaluation" / str(updates),
    config,
    facts,
    held_out=not {row.caption for row in prepared.rows} & set(prepared.prompts),
    curves=curves,
    iterations=table,
    pairs=_gallery(workdir / tuned.PAIRS / str(count)),
  )


def _summary(workdir: Path, k: int, updates: int) -> dict[str, str]:
  """An iteration's row in the report's table."""
  trained = workdir / tuned.ITERATIONS / str(k)
  source = online.open_pairs(workdir / tuned.PAIRS / str(k))
  rows = [source[i] for i in range(len(source))]
  phases = json.loads((trained / _PHASES).read_text())
  results = json.loads((trained / "evaluation" / str(updates) / evaluate.RESULTS).read_text())
  row = {
    "iteration": str(k),
    "pairs trained on": f"{_trained_on(workdir / tuned.PAIRS / str(k))} of {len(rows)}",
    "change, mean": compare.number(float(np.mean([row["change"] for row in rows]))),
  }
  for key, entry in results.items():
    row[key] = compare.number(entry["tuned"]["mean"])
    row[f"{key}, win rate"] = compare.percent(entry["win_rate"])
  for name, seconds in phases.items():
    row[f"{name}, minutes"] = f"{seconds / 60:.1f}"
  return row


def _gallery(directory: Path) -> list[dict[str, Any]]:
  source = online.open_pairs(directory)
  count = min(_GALLERY, len(source))
  shown = []
  for i in np.linspace(0, len(source) - 1, count).astype(int):
    row = source[int(i)]
    tie = ", too little to train on" if row["label_0"] == row["label_1"] else ""
    shown.append(
      {
        "prompt": row["caption"].decode(),
        "note": f"change {row['change']:.2f}{tie}",
        "winner_png": row["jpg_0"],
        "loser_png": row["jpg_1"],
      }
    )
  return shown
