"""A trial of the fault campaign: a run that is harmed and restarted."""

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import jax
from orbax.checkpoint import v1 as ocp

from jaxpref.models import pipeline
from jaxpref.runtime import checkpoint_files

ROOT = Path(__file__).parent.parent
QUICK = "--xla_backend_optimization_level=0"
SAVING = "*.orbax-checkpoint-tmp"
STARTS = 8  # maximum number of starts; a trial that needs more has failed
FIELDS = {
  "train.num_updates": 40,
  "train.updates_per_iteration": 5,
  "train.keep": 3,
  "train.max_skipped": 100,  # one setting has non-finite losses
  "train.hang_minutes": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A run: a configuration file, further fields, and the number of processes."""

  method: str = "dro"
  processes: int = 1
  fields: tuple[str, ...] = ()


SETTINGS = {
  "one process": Setting(),
  "two processes": Setting(processes=2),
  "iterative": Setting(
    "spin", fields=("train.num_updates=8", "evaluate.num_prompts=3", "iterate.num_pairs=16")
  ),
  "not finite": Setting(fields=("loss.name=benchmarks.sometimes_nan", "loss.margin=0.05")),
}


class TooLateError(Exception):
  """The run ended before the fault."""


class Trial:
  """A workdir, its environment, and actions on the runs in it."""

  def __init__(self, name: str, directory: Path, model: Path, seed: list[int | str]):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    self.name, self.setting = name, SETTINGS[name]
    self.directory, self.model = directory, model
    self.random = random.Random(str(seed))
    self.workdir = directory / "run"
    self.env = os.environ | {
      "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {QUICK}",
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
      "TFDS_DATA_DIR": str(directory.parent / "data"),
      "PYTHONPATH": str(ROOT),
    }
    self.starts = 0

  def arguments(self) -> list[str]:
    """Returns the arguments of `jaxpref.main`."""
    fields = {**FIELDS, "model.path": self.model}
    flags = [f"{name}={value}" for name, value in fields.items()] + list(self.setting.fields)
    return [
      f"--config=configs/{self.setting.method}.py:tiny",
      f"--workdir={self.workdir}",
      *(f"--config.{flag}" for flag in flags),
    ]

  def start(self) -> list[subprocess.Popen]:
    """Starts all processes of a run; each writes a log."""
    self.starts += 1
    port = 20000 + self.random.randrange(20000)
    processes = []
    for i in range(self.setting.processes):
      command = [sys.executable, "-m", "jaxpref.main", *self.arguments()]
      if self.setting.processes > 1:
        command += [f"--coordinator=127.0.0.1:{port}", f"--process_id={i}"]
        command += [f"--num_processes={self.setting.processes}"]
      log = (self.directory / f"log{i}").open("ab")
      processes.append(
        subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log)
      )
    return processes

  def log(self) -> str:
    """Returns what process 0 has logged so far."""
    return (self.directory / "log0").read_text(encoding="utf-8")

  def checkpoints(self) -> list[Path]:
    """Returns the directories of checkpoints, also those of iterations."""
    # Not a recursive search, which would fail if Orbax renamed a directory meanwhile.
    places = ("checkpoints", "iterations/*/checkpoints")
    return sorted(found for place in places for found in self.workdir.glob(place))

  def finish(self) -> None:
    """Restarts the run until it ends well."""
    while True:
      if self.starts >= STARTS:
        raise RuntimeError(f"not finished after {STARTS} starts: {self.log()[-500:]}")
      if not any(end(self.start())):
        return


def end(processes: list[subprocess.Popen], limit: float = 300) -> list[int]:
  """Waits for exit statuses; kills the others 20 s after the first failure, as launchers do."""
  deadline = time.monotonic() + limit
  failed = False
  while (statuses := [p.poll() for p in processes]) and None in statuses:
    if not failed and any(statuses):
      failed, deadline = True, min(deadline, time.monotonic() + 20)
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    time.sleep(0.02)
  return statuses


def kill(processes: list[subprocess.Popen]) -> None:
  """Kills all processes at once; raises `TooLateError` if one has ended already."""
  if any(p.poll() is not None for p in processes):
    raise TooLateError
  for process in processes:
    process.kill()
  end(processes)


def wait_for(processes: list[subprocess.Popen], condition: Callable[[], bool]) -> bool:
  """Waits for a condition; returns whether it came true before a process ended."""
  while all(p.poll() is None for p in processes):
    if condition():
      return True
    time.sleep(0.001)
  return False


def digest(workdir: Path) -> str:
  """Computes a digest of all arrays of the last checkpoint."""
  directory = max((*workdir.glob("iterations/*/checkpoints"), workdir / "checkpoints"))
  found = checkpoint_files.find_good(directory)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
    ocp.checkpointables_metadata(directory / str(found.step)).metadata["state"],
  )
  state = checkpoint_files.restore_subtree(directory, found.step, abstract)
  return pipeline.fingerprint(state)


@contextlib.contextmanager
def disk(trial: Trial, *, size: str) -> Iterator[None]:
  """Mounts a small disk as the trial's workdir."""
  place = trial.workdir
  place.mkdir(parents=True, exist_ok=True)
  command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
  subprocess.run(command, check=True)
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", str(place)], check=False)


def keep(trial: Trial) -> None:
  """Copies a workdir from its small disk, for a later comparison."""
  copy = trial.directory / "copy"
  shutil.copytree(trial.workdir, copy)
  trial.workdir = copy


def error_of(trial: Trial) -> str:
  """Returns the last error that process 0 has printed."""
  said = [line for line in trial.log().splitlines() if line.startswith("jaxpref: error")]
  if "Traceback" in trial.log():
    raise RuntimeError(f"a traceback: {trial.log()[-1000:]}")
  return said[-1].replace(f"{trial.directory}/", "") if said else ""


def make_model(runs: Path) -> Path:
  """Makes the tests' pipeline of a few thousand random parameters."""
  sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
  import families  # noqa: PLC0415

  directory = runs / "model"
  if not directory.exists():
    families.write_tiny(directory)
  return directory / "pipeline"
