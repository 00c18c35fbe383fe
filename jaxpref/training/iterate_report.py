"""Metrics of iterations, one line for each, and the report of an iterative run."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxpref.data import generated_pairs
from jaxpref.errors import DamagedError
from jaxpref.evaluation import evaluate, score_text
from jaxpref.runtime import jax_setup, metrics
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import load_run

PHASES = "phases.json"  # seconds by phase, of an iteration's pairs and of its training
_GALLERY = 12


def write_metrics(config: ConfigDict, workdir: Path, k: int) -> None:
  """Writes one line of metrics for each iteration into the run's workdir."""
  lines = []
  for i in range(1, k + 1):
    changes = generated_pairs.changes(workdir / load_run.PAIRS / str(i))
    phases = {f"time/{name}_seconds": seconds for name, seconds in _phases(workdir, i).items()}
    pairs = {
      "pairs/pairs": len(changes),
      "pairs/trained_on": generated_pairs.count_kept(changes, config.data),
      "pairs/change": float(changes.mean()),
    }
    lines.append(json.dumps({"step": i, **pairs, **phases}) + "\n")
  workdir_lib.write_text(workdir / metrics.FILE, "".join(lines))


def _phases(workdir: Path, k: int) -> dict[str, float]:
  files = (workdir / load_run.PAIRS / str(k), workdir / load_run.ITERATIONS / str(k))
  found: dict[str, float] = {}
  for directory in files:
    found |= workdir_lib.read_or_set_aside(directory / PHASES, are_phases, missing={})
  return found


def are_phases(value: Any) -> bool:
  """Tells whether a JSON value is seconds by phase."""
  return isinstance(value, dict) and all(
    isinstance(seconds, int | float) and 0 <= seconds < math.inf for seconds in value.values()
  )


def is_finished(workdir: Path, config: ConfigDict, k: int) -> bool:
  """Tells whether iteration `k` is trained and evaluated; damaged results count as not."""
  trained = workdir / load_run.ITERATIONS / str(k)
  # This file is written last.
  if workdir_lib.read_or_set_aside(trained / PHASES, are_phases) is None:
    return False
  try:
    evaluate.read_results(trained / "evaluation" / str(config.train.num_updates))
  except DamagedError:
    return False
  return True


def write_report(
  workdir: Path, config: ConfigDict, data: Mapping[str, str], *, held_out: bool
) -> None:
  """Reports the last iteration's evaluation, all iterations' curves and some pairs.

  Args:
    workdir: of the run.
    config: of the whole run.
    data: facts about the data, by label.
    held_out: whether the evaluation's prompts are all absent from the training captions.
  """
  count, updates = config.iterate.num_iterations, config.train.num_updates
  curves: dict[str, list[tuple[float, float]]] = {}
  table = []
  for k in range(1, count + 1):
    trained = workdir / load_run.ITERATIONS / str(k)
    for name, points in metrics.read_curves(trained).items():
      shifted = [(step + (k - 1) * updates, value) for step, value in points]
      curves.setdefault(name, []).extend(shifted)
    table.append(_summary(config, workdir, k))
  last = workdir / load_run.ITERATIONS / str(count)
  facts = {
    "iterations": count,
    "updates in each": updates,
    "pairs generated in each": config.iterate.num_pairs,
    **data,
    "seed": config.seed,
    **jax_setup.facts(),
  }
  evaluate.write_report(
    workdir,
    last / "evaluation" / str(updates),
    config,
    facts,
    held_out=held_out,
    curves=curves,
    iterations=table,
    pairs=_gallery(config, workdir / load_run.PAIRS / str(count)),
  )


def _summary(config: ConfigDict, workdir: Path, k: int) -> dict[str, str]:
  """Returns an iteration's row in the report's table."""
  evaluation = workdir / load_run.ITERATIONS / str(k) / "evaluation"
  results = evaluate.read_results(evaluation / str(config.train.num_updates))
  changes = generated_pairs.changes(workdir / load_run.PAIRS / str(k))
  row = {
    "iteration": str(k),
    "pairs trained on": f"{generated_pairs.count_kept(changes, config.data)} of {len(changes)}",
    "change, mean": score_text.number(changes.mean()),
  }
  for key, entry in results.items():
    mean, rate = (
      score_text.number(entry["tuned"]["mean"]),
      score_text.percent(entry["win_rate"]),
    )
    row[f"{key}, win rate"] = f"{mean}, {rate}"
  phases = _phases(workdir, k)
  minutes = (score_text.number(seconds / 60) for seconds in phases.values())
  row[f"minutes: {', '.join(phases)}"] = ", ".join(minutes)
  return row


def _gallery(config: ConfigDict, directory: Path) -> list[dict[str, Any]]:
  source = generated_pairs.open_pairs(directory)
  count = min(_GALLERY, len(source))
  shown = []
  for i in np.linspace(0, len(source) - 1, count).astype(int):
    row = source[int(i)]
    little = float(row["change"]) < config.data.min_change
    tie = ", too little to train on" if little else ""
    shown.append(
      {
        "prompt": row["caption"].decode(),
        "note": f"change {row['change']:.2f}{tie}",
        "winner_png": row["jpg_0"],
        "loser_png": row["jpg_1"],
      }
    )
  return shown
