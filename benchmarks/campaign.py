"""What campaigns of many runs share: each run once, a finished one never again."""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from jaxpref import main
from jaxpref.models import pipeline

_FINISHED = "finished.json"  # in a workdir: what was asked for, and how long it took


def check_base(runs: Path, model: str) -> None:
  """Refuses a directory of runs that tuned another base, and remembers this one's."""
  weights = pipeline.load_pipeline(model).digest
  record = runs / "base.txt"
  if record.exists() and record.read_text() != weights:
    sys.exit(f"the runs in {runs} tuned another base; choose another --runs")
  runs.mkdir(parents=True, exist_ok=True)
  record.write_text(weights)


def run(workdir: Path, arguments: Sequence[str]) -> bool:
  """Makes a run that is not there yet, or goes on with one that was interrupted.

  Args:
    workdir: of the run.
    arguments: of `jaxpref.main`, besides the workdir.

  Returns:
    Whether it is finished; if not it failed, as a learning rate may be too high, and says
    why on the terminal.
  """
  if is_finished(workdir, arguments):
    return True
  print(f"\n== {workdir}: {' '.join(arguments)}", flush=True)
  began = time.perf_counter()
  status = main.main([f"--workdir={workdir}", *arguments])
  jax.clear_caches()  # the next run has programs of its own
  if status == 130:  # interrupted
    sys.exit(status)
  if not status:
    part = {"seconds": time.perf_counter() - began, "arguments": list(arguments)}
    (workdir / _FINISHED).write_text(json.dumps(part))
  return not status


def is_finished(workdir: Path, arguments: Sequence[str]) -> bool:
  """Whether this very run has been made; another one there is for `main` to refuse."""
  record = workdir / _FINISHED
  return record.exists() and json.loads(record.read_text())["arguments"] == list(arguments)


def minutes_of(workdir: Path) -> float:
  """How long a run took, with its evaluation; of a resumed one the last part."""
  return json.loads((workdir / _FINISHED).read_text())["seconds"] / 60


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
