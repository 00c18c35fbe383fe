"""The test of a reward model on pairs that it was not trained on, and its report."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import rng, sharding
from jaxpref.data import encode
from jaxpref.data.built_rows import StoredImages
from jaxpref.diffusion import levels as levels_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.evaluation import best_checkpoint, report
from jaxpref.evaluation.paired_tests import wilson_interval
from jaxpref.models import reward_model
from jaxpref.runtime import distributed, jax_setup, metrics, watchdog
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import judge_settings, train_step
from jaxpref.training.batch import Arms
from jaxpref.training.setup import Prepared

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the training levels, from little to much noise


class JudgeEvaluator:
  """Counts in how many held-out pairs the preferred image has the larger reward.

  Args:
    prepared: the run's input.
    workdir: the run's.
  """

  def __init__(self, prepared: Prepared, workdir: Path):
    self._prepared, self._workdir = prepared, workdir
    config, pipeline, mesh = prepared.config, prepared.pipeline, prepared.mesh
    assert prepared.held_out is not None  # of such a run
    self._rows = encode.encode_rows(pipeline, mesh, prepared.held_out, flip=False)
    self._uncond = None
    if config.judge.guidance > 1:
      self._uncond = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
    score = judge_settings.make_score(config, pipeline, mesh=mesh)
    seed = config.evaluate.seed
    self._margins = jax.jit(functools.partial(_margins, score, prepared.schedule, seed))

  def is_due(self, done: int) -> bool:
    """Tells whether a test during the run follows after `done` updates."""
    return best_checkpoint.is_due(self._prepared.config, done)

  def keep_best(self) -> None:
    """Keeps the newest checkpoints only."""

  def evaluate(self, models: Mapping[str, Any], done: int) -> None:
    """Tests the averaged parameters, 'tuned', and writes `evaluation/<done>/accuracy.json`."""
    watchdog.rest()  # while its program is compiled
    found = self._test(models["tuned"])
    file = self._workdir / "evaluation" / str(done) / "accuracy.json"
    distributed.first(lambda: workdir_lib.write_json(file, found))

  def _test(self, params: Any) -> list[dict[str, Any]]:
    """Returns the accuracy by noise level, over all held-out pairs."""
    prepared = self._prepared
    count, mesh = len(self._rows["labels"]["desirable"]), prepared.mesh
    train = prepared.config.train
    size = sharding.round_up(min(train.batch_size // train.accumulate, count), mesh)
    levels = np.asarray(levels_lib.level_at(prepared.schedule, jnp.asarray(SHARES)))
    found = []
    for level in levels:
      right = []
      for start in range(0, count, size):
        index = np.arange(start, start + size).clip(max=count - 1)
        batch = sharding.place_batch(self._rows, mesh, index)
        margins = self._margins(params, batch, self._uncond, level, start)
        right += (sharding.to_host(margins)[: count - start] > 0).tolist()
        watchdog.beat_or_stop()
      interval = wilson_interval(sum(right), len(right))
      accuracy = {"mean": float(np.mean(right)), "interval": interval, "pairs": len(right)}
      found.append({"level": float(level), **accuracy})
    return found

  def write_report(self, wall_time: str) -> None:
    """Prints the last test and writes `report.html`; on process 0."""
    prepared, config = self._prepared, self._prepared.config
    assert prepared.held_out is not None  # of such a run
    directory = self._workdir / "evaluation" / str(config.train.num_updates)
    found = workdir_lib.read_json(directory / "accuracy.json", _are_accuracies)
    table = [_row(of) for of in found]
    stored = prepared.rows.images
    facts = {
      "updates": config.train.num_updates,
      "training rows": f"{len(prepared.rows)} pairs",
      "held-out rows": f"{len(prepared.held_out)} pairs",
      **(stored.table.about if isinstance(stored, StoredImages) else {}),
      **prepared.data.words(),
      "seed": config.seed,
      **jax_setup.facts(),
      "wall time": wall_time,
    }
    path = self._workdir / "report.html"
    said = (
      f"The reward model is right on {table[0]['right']} of the held-out pairs with little "
      f"noise, and on {table[-1]['right']} with much."
    )
    report.write_report(
      path,
      title=f"{config.name} ({config.preset})",
      config=config.to_dict(),
      results={},
      categories=[],
      curves=metrics.read_curves(self._workdir),
      examples=[],
      facts=facts,
      said=said,
      accuracies=table,
    )
    for row in table:
      print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(f"{said}\nreport: {path}")


def _margins(
  score: reward_model.Score,
  schedule: schedule_lib.Schedule,
  seed: int,
  params: Any,
  batch: Any,
  uncond: Any,
  level: jax.Array,
  start: int,
) -> jax.Array:
  """Returns the differences of the rewards of pairs, [B], at a level and with equal noise."""
  x0 = batch["latents"]
  count, key = x0.shape[0], rng.key_of(seed, "held out", 0)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, start + i))(jnp.arange(count))
  eps = jax.vmap(lambda k: jax.random.normal(k, (1, *x0.shape[2:])))(keys)
  t = jnp.full(count, level)
  x_t = schedule_lib.add_noise(schedule, x0, jnp.broadcast_to(eps, x0.shape), t)
  arms = Arms(x_t, x_t, t, batch["cond"], {}, {})  # rewards have no target
  found = train_step.rewards(score, schedule, params, uncond, arms, ("w", "l"))
  return found["w"] - found["l"]


def _row(found: Mapping[str, Any]) -> dict[str, str]:
  low, high = found["interval"]
  return {
    "level": f"{found['level']:.4g}",
    "right": f"{100 * found['mean']:.1f} %",
    "95 % interval": f"{100 * low:.1f} to {100 * high:.1f} %",
    "pairs": str(found["pairs"]),
  }


def _are_accuracies(value: Any) -> bool:
  return isinstance(value, list) and all(
    isinstance(of, dict) and {"level", "mean", "interval", "pairs"} <= of.keys() for of in value
  )
