"""Coordination of the processes of one run: start, agreement, shared workdir, failures.

All processes run the same program with the same arguments and see the same workdir. Only
process 0 reads and writes the workdir; it sends the results and its errors to the others. A
process that fails alone ends at once and does not wait for the others at a barrier. The
others detect the loss and end too, and the launcher starts all of them again.
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
from ml_collections import ConfigDict

from jaxpref.errors import TransientError, UserError, first_line
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.runtime.paths import number_of

# Launchers that start several processes: the variable with the number of processes, and a
# variable that only the launched processes have (a batch script has the first one, too).
_LAUNCHERS = {
  "SLURM_NTASKS": "SLURM_STEP_NODELIST",
  "OMPI_COMM_WORLD_SIZE": "OMPI_MCA_orte_hnp_uri",
}
_RANKS = {"SLURM_NTASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
_TOKEN = ".shared"  # file in the workdir that process 0 writes and the others look for
_SHARED_SECONDS = 30.0  # how long they look; network file systems show new files late
_END, _END_MILLISECONDS = "jaxpref-end", 5000  # the barrier before the end
_LAST_SECONDS = 2.0  # how long process 0 outlives the others
# Parts of the messages of JAX errors that mean that another process is gone.
_LOST = (
  *("Gloo", "onnection reset", "onnection closed", "eartbeat", "oordination"),
  "emote process exited",  # NCCL
)


def initialize(flags: Mapping[str, str]) -> None:
  """Connects to the other processes of this run, if there are any.

  Must be called before JAX initializes its devices.

  Args:
    flags: those of 'coordinator', 'num_processes' and 'process_id' that the user gave (see
      `main.FLAGS`). Without any of them, the environment of SLURM's and Open MPI's launchers
      decides.

  Raises:
    UserError: the flags are incomplete or invalid.
    TransientError: the connection failed. (After its own timeout JAX ends the process.)
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
      reason = "this is not a TPU pod and was not started by SLURM, Open MPI or Kubernetes"
      kind = UserError
    raise kind(f"the processes of this run did not meet: {reason}") from error
  if not is_first():
    # Only process 0 logs warnings, which otherwise appear once a process.
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
    raise UserError(f"--process_id must be less than --num_processes={count} (got {index})")
  host, _, port = coordinator.rpartition(":")
  if not (host and 0 < (number_of(port) or 0) < 65536):
    raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
  return {"coordinator_address": coordinator, "num_processes": count, "process_id": index}


def launched() -> tuple[int, int]:
  """Returns the number of this process and the number of all, without connecting them.

  SLURM's and Open MPI's launchers say so in the environment, and the runtime of a TPU pod does;
  a single process is 0 of 1. For jobs whose processes need nothing of each other.
  """
  for count, inside in _LAUNCHERS.items():
    total, rank = (number_of(os.environ.get(name, "")) for name in (count, _RANKS[count]))
    if inside in os.environ and total and rank is not None and rank < total:
      return rank, total
  return jax.process_index(), jax.process_count()


def is_first() -> bool:
  """Tells whether this is process 0, which writes the run's files."""
  return jax.process_index() == 0


def first(job: Callable[[], Any]) -> Any:
  """Runs a job on process 0 only and returns its result on every process.

  Args:
    job: a function without arguments; its result must survive a round trip through JSON.

  Raises:
    UserError: the job raised it; raised on every process.
  """
  if jax.process_count() == 1:
    return job()
  return _exchange(job if is_first() else None)[0]


def together(job: Callable[[], Any]) -> Any:
  """Runs a job on every process; a failure of one process is raised on all of them.

  The job must not wait for other processes, because they may already have failed.

  Returns:
    The result of the job on this process.

  Raises:
    UserError: the job raised it on this process or on another one.
  """
  if jax.process_count() == 1:
    return job()
  done = []
  _exchange(lambda: done.append(job()))
  return done[0]


def check_same(what: str, values: Mapping[str, str]) -> None:
  """Refuses a run whose processes have different values.

  Args:
    what: what the values are, for the message, such as 'configurations'.
    values: name to value on this process.

  Raises:
    UserError: another process has different values.
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
  """Runs a job and returns its results on all processes, ordered by process.

  A `UserError` on one process is raised on all of them. Without a job, this process adds None.
  """
  failure: BaseException | None = None
  try:
    text = json.dumps({"value": job() if job else None})
  except UserError as error:
    failure = error
    text = json.dumps({"error": str(error), "status": error.status})
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = np.atleast_1d(multihost_utils.process_allgather(np.int32(len(data))))
  # XLA compiles one program per length, so powers of two keep the programs few.
  padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
  padded[: len(data)] = data
  gathered = multihost_utils.process_allgather(padded)
  messages = [
    json.loads(row[:n].tobytes()) for row, n in zip(gathered, lengths.ravel(), strict=True)
  ]
  if failure:
    raise failure
  for index, message in enumerate(messages):
    if "error" in message:
      theirs = UserError(f"{message['error']} (process {index})")
      theirs.status = message["status"]
      raise theirs
  return [message["value"] for message in messages]


@contextlib.contextmanager
def open_workdir(path: Any, config: ConfigDict, *, resume_safe: Any) -> Iterator[Path]:
  """Opens a run's directory on process 0, yields its path on all processes, and unlocks it.

  See `workdir.open_workdir` for the arguments.

  Raises:
    UserError: the directory cannot be opened, or some process sees another directory.
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
    for workdir in opened:
      workdir_lib.release(workdir)


def _check_shared(directory: Path, token: str) -> None:
  """Waits until the token that process 0 wrote is visible in the directory."""
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
  """Ends this process at once if it is one of several, so that none waits for another.

  Returns without doing anything if this is the only process or the exit status is 0.

  Args:
    error: the exception that is about to end the process.
  """
  alone = not jax.distributed.is_initialized() or jax.process_count() == 1
  if alone or (isinstance(error, SystemExit) and not error.code):
    return
  lost = isinstance(error, jax.errors.JaxRuntimeError) and any(t in str(error) for t in _LOST)
  if lost:
    print(
      f"jaxpref: error: process {jax.process_index()} has lost another process "
      f"({first_line(error)}); start all of them again to resume this run",
      file=sys.stderr,
    )
  elif not isinstance(error, SystemExit):
    traceback.print_exception(error)
  sys.stdout.flush()
  sys.stderr.flush()
  if not lost:
    # Most errors occur on all processes. Those then wait for each other here, because a process
    # that ends first would be reported as lost.
    with contextlib.suppress(Exception):
      ocp.multihost.get_barrier_sync_fn()(key=_END, timeout_ms=_END_MILLISECONDS)
  if is_first():
    # Process 0 runs the coordination service, so the others must end before it.
    time.sleep(_LAST_SECONDS)
  # `sys.exit` would run JAX's `atexit` handler, which waits for the other processes.
  os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
