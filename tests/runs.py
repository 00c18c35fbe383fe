"""Runs of the tiny preset and others: their arguments, final parameters and metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxpref import config as config_lib
from jaxpref import main
from jaxpref.evaluation import glossary
from jaxpref.runtime import checkpoint_files


def arguments(pipeline, workdir, method="dro", preset="tiny", **fields):
  overrides = {"model.path": pipeline} | fields
  return [
    f"--config=configs/{method}.py:{preset}",
    f"--workdir={workdir}",
    *(f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()),
  ]


def config(method, **fields):
  """Returns a method's configuration of the preset tiny, with fields changed."""
  found = config_lib.load_config(f"{method}:tiny")
  with found.unlocked():
    for name, value in fields.items():
      section, field = name.split(".")
      found[section][field] = value
  return found


def parameters(workdir):
  """Returns the step of the newest checkpoint, and its arrays by their paths in the state."""
  directory = workdir / "checkpoints"
  newest = max(checkpoint_files.steps(directory))
  # A checkpoint of any mesh is restored onto one device.
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    ocp.checkpointables_metadata(directory / str(newest)).metadata["state"],
  )
  state = ocp.load_checkpointables(directory / str(newest), {"state": abstract})["state"]
  flat = {}

  def visit(tree, path):
    if isinstance(tree, dict):
      for key, value in tree.items():
        visit(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
      for key, value in enumerate(tree):
        visit(value, f"{path}/{key}")
    elif tree is not None:
      flat[path] = np.asarray(tree)

  visit(state, "")
  return newest, flat


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def check_glossary(logged):
  """Checks that all metrics of a run's lines have a meaning."""
  names = {metric for line in logged for metric in line} - {"step", "time"}
  unknown = [name for name in names if not glossary.find_metric(name)]
  assert not unknown, "give these metrics a meaning in jaxpref/evaluation/glossary.py"


def check_resumed(pipeline, root, method, *, updates, **fields):
  """Checks that a run goes on from an earlier checkpoint to the bits of the whole run.

  Of the two numbers of updates, the first is that checkpoint's and the last the whole run's.
  Returns the workdirs of the whole run and of the one that goes on, below `root`.
  """
  whole, parts = root / "whole", root / "parts"
  first, last = updates
  given = {**fields, "train.num_updates": last}
  assert main.main(arguments(pipeline, whole, method, **given)) == 0
  shutil.copytree(whole, parts)
  _return_to(parts, first)
  assert main.main(arguments(pipeline, parts, method, **given)) == 0
  check_same(parts, whole)
  check_glossary(lines(whole))
  return whole, parts


def check_same(workdir, other):
  """Checks that the newest checkpoints of two runs have the same step and bits."""
  ours, theirs = parameters(workdir), parameters(other)
  assert ours[0] == theirs[0]
  for path, array in theirs[1].items():
    np.testing.assert_array_equal(ours[1][path], array, err_msg=path)


def kill(arguments, workdir, log, *, saved, logged):
  """Starts a run as a program, and kills it once it has saved one update and logged another."""
  process = subprocess.Popen(
    [sys.executable, "-m", "jaxpref.main", *arguments],
    cwd=conftest.ROOT,
    env=os.environ | conftest.WITHOUT_TORCH,
    stdout=log.open("a"),
    stderr=subprocess.STDOUT,
  )
  file = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    whole = (workdir / "checkpoints" / str(saved) / "checksums.json").exists()
    if whole and file.exists() and file.read_bytes().count(b"\n") >= logged:
      break
    time.sleep(0.002)
  assert process.poll() is None, log.read_text()[-2000:]
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def _return_to(workdir, step):
  """Removes the files that a run wrote after a checkpoint.

  Its metrics keep the later lines: a run that resumes has to remove them.
  """

  def written(path):
    return max(file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file())

  saved = written(workdir / "checkpoints" / str(step))
  for path in (workdir / "checkpoints").iterdir():
    if path.is_dir() and written(path) > saved:
      shutil.rmtree(path)
  assert max(checkpoint_files.steps(workdir / "checkpoints")) == step
  for file in workdir.rglob("*"):
    late = file.is_file() and file.stat().st_mtime_ns > saved
    if late and file.name != "metrics.jsonl":
      file.unlink()


def train_published(config, workdir, fields, capsys):
  """Trains a preset of a published model with changed fields; returns the logged metrics."""
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  arguments = [f"--config={config}", f"--workdir={workdir}", *flags]
  assert main.main(arguments) == 0, capsys.readouterr().err
  logged = lines(workdir)
  assert np.isfinite(logged[-1]["loss"]) and logged[-1]["optim/grad_norm"] > 0
  return logged
