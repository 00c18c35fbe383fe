"""What campaigns of many runs share: each run once, a finished one never again."""

import argparse
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

from jaxpref import config as config_lib
from jaxpref import main
from jaxpref.models import pipeline

_FINISHED = "finished.json"  # in a workdir: what was asked for, and how long it took


def make_parser(description: str, name: str) -> argparse.ArgumentParser:
  """Options that all campaigns have; `name` is that of their folders."""
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  add = parser.add_argument
  add("--out", type=Path, default=Path("docs") / name, help="for tables and results")
  add("--runs", type=Path, default=Path("runs") / name, help="for the runs' workdirs")
  add("--seeds", type=int, nargs="+", default=[0, 1, 2])
  add("--preset", default="shapes", help="of all configurations")
  add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="in all configurations")
  return parser


def model_of(arguments: Sequence[str]) -> str:
  """The base that a run with these arguments tunes."""
  config, _ = config_lib.parse_args(list(arguments), flags={})
  return config.model.path


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


def provenance(command: str, seeds: Sequence[int], changed: Sequence[str]) -> str:
  """Machine, date, versions, seeds, and fields set in all runs, as one or two sentences."""
  versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "diffusers"))
  return (
    f"Made by `{command}` on {datetime.date.today()}: {platform.machine()}, "
    f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}; "
    f"seeds {', '.join(map(str, seeds))}."
    + (f" Changed: {', '.join(changed)}." if changed else "")
  )
