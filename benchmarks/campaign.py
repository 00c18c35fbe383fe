"""What campaigns of many runs share: each run once, a finished one never again."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from jaxpref import config as config_lib
from jaxpref import main
from jaxpref.models import pipeline


def check_base(runs: Path, model: str) -> None:
  """Refuses a directory of runs that tuned another base, and remembers this one's."""
  weights = pipeline.load_pipeline(model).digest
  record = runs / "base.txt"
  if record.exists() and record.read_text() != weights:
    sys.exit(f"the runs in {runs} tuned another base; choose another --runs")
  runs.mkdir(parents=True, exist_ok=True)
  record.write_text(weights)


def run(workdir: Path, arguments: Sequence[str]) -> None:
  """Makes a run that is not there yet, or goes on with one that was interrupted.

  Args:
    workdir: of the run.
    arguments: of `jaxpref.main`, besides the workdir.
  """
  if is_finished(workdir, arguments):
    return
  print(f"\n== {workdir}: {' '.join(arguments)}", flush=True)
  if status := main.main([f"--workdir={workdir}", *arguments]):
    sys.exit(status)
  jax.clear_caches()  # the next run has programs of its own


def is_finished(workdir: Path, arguments: Sequence[str]) -> bool:
  """Whether this very run has been made; another one there is for `main` to refuse."""
  config, _ = config_lib.parse_args(list(arguments), flags={})
  wanted = json.loads(config_lib.to_json(config))
  stored = workdir / "config.json"
  same = stored.exists() and json.loads(stored.read_text()) == wanted
  return same and (workdir / "report.html").exists()


def newest_evaluation(workdir: Path) -> Path:
  """The directory of a run's last evaluation."""
  return max((workdir / "evaluation").iterdir(), key=lambda p: int(p.name))


def scores_of(workdir: Path) -> pd.DataFrame:
  """A row for each picture and scorer of the run's last evaluation."""
  return pd.read_parquet(newest_evaluation(workdir) / "scores.parquet")


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
  """Mean +- standard deviation over seeds, or the number of a single one."""
  if len(values) == 1:
    return form.format(values[0])
  return f"{form} +- {form}".format(np.mean(values), np.std(values, ddof=1))


def provenance(command: str, seeds: Sequence[int]) -> str:
  """Machine, date, versions and seeds, as one sentence."""
  versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "diffusers"))
  return (
    f"Made by `{command}` on {datetime.date.today()}: {platform.machine()}, "
    f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; "
    f"seeds {', '.join(map(str, seeds))}."
  )
