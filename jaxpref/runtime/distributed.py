"""Several processes as one run: how they meet, agree, and leave the writing to one.

All processes run the same program on the same arguments and see the same workdir. What is
decided from the disk, and all that is written there, is process 0's; what it finds, and its
errors, reach the others. A process that fails alone ends at once, without waiting for the
others at a barrier: they notice, and whoever started them starts all of them again.
"""

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxpref.errors import TransientError, UserError, first_line
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.runtime.paths import number_of

# Environments whose launcher has started this process as one of several, by the variable
# with their number, and one that only a process of such a job has.
_LAUNCHERS = {
  "SLURM_NTASKS": "SLURM_STEP_NODELIST",
  "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri",
}
_TOKEN = ".shared"  # in the workdir: what process 0 has written there for the others to find
_SHARED_SECONDS = 30.0  # until they must; network file systems take their time
_END, _END_MILLISECONDS = "jaxpref-end", 5000
_LAST_SECONDS = 2.0
_LOST = (
  *("Gloo", "onnection reset", "onnection closed", "eartbeat", "oordination"),
  "emote process exited",  # NCCL
)


def initialize(flags: Mapping[str, str]) -> None:
  """Meets the other processes of this run, if there are any; before JAX has any device.

  Args:
    flags: of these that were given: 'coordinator', 'num_processes', 'process_id', see
      `main.FLAGS`. With none of them, SLURM's and Open MPI's launchers are asked.

  Raises:
    UserError: the flags are incomplete.
    TransientError: the others cannot be found; where that takes too long JAX ends the
      process itself.
  """
  settings = _settings(flags)
  if settings is None:
    return
  try:
    jax.distributed.initialize(**settings)
  except (ValueError, RuntimeError) as error:
    reason = first_line(error)
    kind: type[UserError] = TransientError
    if "must be defined" in reason or "should be defined" in reason:
      reason = "this is no TPU pod, and not started by SLURM, Open MPI or Kubernetes"
      kind = UserError
    raise kind(f"the processes of this run did not meet: {reason}") from error
  if not is_first():
    # What concerns all is said once.
    logging.getLogger().setLevel(logging.ERROR)


def _settings(flags: Mapping[str, str]) -> dict[str, Any] | None:
  coordinator = flags.get("coordinator", "")
  numbers = {name: flags[name] for name in ("num_processes", "process_id") if name in flags}
  if coordinator in ("", "auto"):
    if numbers:
      raise UserError(f"--{next(iter(numbers))} needs --coordinator=HOST:PORT")
    several = any(
      inside in os.environ and os.environ.get(count, "1") != "1"
      for count, inside in _LAUNCHERS.items()
    )
    return {} if coordinator or several else None
  count, index = (number_of(numbers.get(name, "")) for name in ("num_processes", "process_id"))
  if count is None or index is None:
    raise UserError("--coordinator=HOST:PORT needs --num_processes=N and --process_id=I")
  if not index < count:
    raise UserError(f"--process_id={index} is none of --num_processes={count}, from 0")
  host, _, port = coordinator.rpartition(":")
  if not (host and 0 < (number_of(port) or 0) < 65536):
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def is_first() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def first(job: Callable[[], Any]) -> Any:
  """Does a job on process 0 alone.

  Args:
    job: without arguments; what it returns must survive JSON.

  Returns:
    What it returned, on every process.

  Raises:
    UserError: what it raised, on every process.
  """
  if jax.process_count() == 1:
    return job()
  return _exchange(job if is_first() else None)[0]


def together(job: Callable[[], Any]) -> Any:
  """Does a job on every process; if it fails on one, it has failed on all.

  Nothing in the job may wait for other processes, which might have failed before it.

  Returns:
    What it returned on this process.

  Raises:
    UserError: what it raised, on this process or on another one.
  """
  if jax.process_count() == 1:
    return job()
  done = []
  _exchange(lambda: done.append(job()))
  return done[0]


def check_same(what: str, values: Mapping[str, str]) -> None:
  """Refuses a run whose processes differ in something that must be the same.

  Args:
    what: all of it, in the message.
    values: of this process, by name.

  Raises:
    UserError: another process has others.
  """
  if jax.process_count() == 1:
    return
  first, *others = _exchange(lambda: dict(values))
  for index, theirs in enumerate(others, 1):
    for name in sorted(first.keys() | theirs.keys()):
      one, other = first.get(name, "absent"), theirs.get(name, "absent")
      if one != other:
        raise UserError(
          f"processes 0 and {index} have different {what}: {name} is {one} and {other}"
        )


def _exchange(job: Callable[[], Any] | None) -> list[Any]:
  """What the job returned on each process, on all of them; an error of one is everyone's."""
  failure: BaseException | None = None
  try:
    text = json.dumps({"value": job() if job else None})
  except UserError as error:
    failure = error
    text = json.dumps({"error": str(error), "status": error.status})
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = np.atleast_1d(multihost_utils.process_allgather(np.int32(len(data))))
  # A power of two: few programs for all the lengths there may be.
  padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
  padded[: len(data)] = data
  gathered = multihost_utils.process_allgather(padded)
  said = [
    json.loads(row[:n].tobytes()) for row, n in zip(gathered, lengths.ravel(), strict=True)
  ]
  if failure:
    raise failure
  for index, one in enumerate(said):
    if "error" in one:
      theirs = UserError(f"{one['error']} (process {index})")
      theirs.status = one["status"]
      raise theirs
  return [one["value"] for one in said]


@contextlib.contextmanager
def open_workdir(path: Any, config: Any, *, resume_safe: Any) -> Iterator[Path]:
  """A run's directory for the time of the run, see `workdir.open_workdir`.

  Raises:
    UserError: it cannot be opened, or other processes do not see it.
  """
  opened: list[workdir_lib.Workdir] = []

  def make() -> list[str]:
    opened.append(workdir_lib.open_workdir(path, config, resume_safe=resume_safe))
    token = uuid.uuid4().hex
    if jax.process_count() > 1:
      workdir_lib.write_text(opened[0].path / _TOKEN, token)
    return [str(opened[0].path), token]

  try:
    name, token = first(make)
    directory = Path(name)
    if jax.process_count() > 1:
      together(lambda: _check_shared(directory, token))
    yield directory
  finally:
    for one in opened:
      workdir_lib.release(one)


def _check_shared(directory: Path, token: str) -> None:
  deadline = time.monotonic() + _SHARED_SECONDS
  while True:
    with contextlib.suppress(OSError, ValueError):
      file = directory / _TOKEN
      if file.is_file() and file.read_text(encoding="utf-8") == token:
        return
    if time.monotonic() > deadline:
      raise UserError(f"{directory} is not the same directory for all processes of the run")
    time.sleep(0.2)


def end_alone(error: BaseException) -> None:
  """Ends this process at once where others would wait for it, or it for them.

  Args:
    error: what it is about to end with; nothing happens if all is well, or it is alone.
  """
  alone = not jax.distributed.is_initialized() or jax.process_count() == 1
  if alone or (isinstance(error, SystemExit) and not error.code):
    return
  lost = isinstance(error, jax.errors.JaxRuntimeError) and any(t in str(error) for t in _LOST)
  if lost:
    print(
      f"jaxpref: error: process {jax.process_index()} has lost another one "
      f"({first_line(error)}); "
      "started again, all of them continue this run",
      file=sys.stderr,
    )
  elif not isinstance(error, SystemExit):
    traceback.print_exception(error)
  sys.stdout.flush()
  sys.stderr.flush()
  if not lost:
    # Most errors are everyone's: then all meet here, and none is taken for a lost one.
    with contextlib.suppress(Exception):
      ocp.multihost.get_barrier_sync_fn()(key=_END, timeout_ms=_END_MILLISECONDS)
  if is_first():
    # It has the service that the others talk to: they should be gone before it.
    time.sleep(_LAST_SECONDS)
  # Not by way of `atexit`, where JAX would wait for the others.
  os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
