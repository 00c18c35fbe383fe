"""Checkpoints of a run: written while training goes on, checked before they are trusted.

`<directory>/<step>/` is one Orbax checkpoint, to which every process of a run adds its
part. Orbax writes it under a temporary name and renames it when it is whole; then
`checksums.json` is added, so that a file that was lost, cut or altered later is noticed at
the restore, which goes back to the newest good step.
"""

import dataclasses
import errno
import functools
import json
import logging
import math
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from jaxpref import distributed
from jaxpref.errors import UserError, storage_error
from jaxpref.workdir import write_json

CHECKSUMS = "checksums.json"
_TEMPORARY = ".orbax-checkpoint-tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "quota exceeded")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpointer:
  """The checkpoints of one run.

  Attributes:
    directory: absolute path of the directory of steps.
    keep: how many of the newest checkpoints stay.
    protected: the step whose checkpoint stays, however old; at most one.
    worker: the one thread that finishes saves.
    pending: the save under way, at most one: (step, its end).
  """

  directory: Path
  keep: int
  protected: list[int]
  worker: futures.ThreadPoolExecutor
  pending: list[tuple[int, futures.Future]]


class Restored(NamedTuple):
  """What `save` was given."""

  step: int
  state: Any
  data_state: Any
  metadata: dict[str, Any]


def open_checkpointer(directory: str | Path, *, keep: int) -> Checkpointer:
  """Makes the directory and removes what a killed save has left half-written.

  Args:
    directory: one run's checkpoints; no other process may write there.
    keep: how many of the newest checkpoints stay, at least 1.

  Raises:
    UserError: the directory cannot be made.
  """
  if keep < 1:
    raise ValueError(f"keep must be at least 1, got {keep}")
  absl_logging.get_absl_logger().addFilter(_is_not_orbax_error)
  directory = Path(directory).absolute()

  def make() -> None:
    try:
      directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"cannot write to {directory}: {error.strerror}") from error
    _remove_temporary(directory)

  distributed.first(make)
  return Checkpointer(directory, keep, [], futures.ThreadPoolExecutor(1), [])


def steps(directory: str | Path) -> list[int]:
  """The steps of the finished checkpoints, ascending; good or not."""
  return sorted(int(p.name) for p in Path(directory).iterdir() if p.name.isdecimal())


def protect(ckptr: Checkpointer, step: int) -> None:
  """Keeps the checkpoint of this step, in the place of the one that was kept before."""
  ckptr.protected[:] = [step]


def latest_step(ckptr: Checkpointer) -> int | None:
  """The newest finished checkpoint's step, if any."""
  return distributed.first(lambda: max(steps(ckptr.directory), default=None))


def save(
  ckptr: Checkpointer,
  step: int,
  state: Any,
  data_state: Any,
  metadata: Mapping[str, Any],
) -> None:
  """Starts to save; returns once `state` has been copied, so it may be donated.

  Waits for the save before this one and reports its failure.

  Args:
    ckptr: the checkpoints.
    step: number of updates made; not saved before.
    state: pytree of `jax.Array`, typed keys included.
    data_state: position of the data, as JSON (a grain iterator's `get_state()`).
    metadata: anything else, as JSON.

  Raises:
    UserError: this or the previous checkpoint could not be written (disk full, ...);
      what was half-written is removed and earlier checkpoints are intact.
  """
  wait(ckptr)
  path = ckptr.directory / str(step)
  record = {"data": data_state, "metadata": dict(metadata)}
  if json.loads(json.dumps(record)) != record:
    raise ValueError(f"data_state and metadata must survive JSON, got {record}")
  needed = math.ceil(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

  def check() -> None:
    if path.exists():
      raise ValueError(f"step {step} is already saved in {ckptr.directory}")
    free = shutil.disk_usage(ckptr.directory).free
    if free < needed:
      sizes = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
      raise UserError(_not_written(ckptr, step, f"no space left ({sizes})"))

  distributed.first(check)
  try:
    response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=record)
  except (OSError, ValueError) as error:
    _raise_failure(ckptr, step, error)
  ckptr.pending.append((step, ckptr.worker.submit(_finish, ckptr, path, response)))


def wait(ckptr: Checkpointer) -> None:
  """Waits until the save under way is finished.

  Raises:
    UserError: it could not be written; see `save`.
  """
  distributed.together(functools.partial(_wait, ckptr))


def _wait(ckptr: Checkpointer) -> None:
  while ckptr.pending:
    step, future = ckptr.pending.pop()
    try:
      future.result()
    except (OSError, ValueError, UserError) as error:
      _raise_failure(ckptr, step, error)


def close(ckptr: Checkpointer) -> None:
  """Waits like `wait`, for what this process writes, and ends the thread."""
  try:
    _wait(ckptr)
  finally:
    ckptr.worker.shutdown()


def restore(ckptr: Checkpointer, abstract_state: Any) -> Restored:
  """Restores the newest checkpoint that is good.

  Damaged newer ones are named in a warning and renamed to `<step>.damaged`.

  Args:
    ckptr: the checkpoints, at least one.
    abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    (step, state, data_state, metadata), the arrays bit for bit what was saved.

  Raises:
    UserError: no checkpoint is good (it lists what was found), or the newest good one
      holds another structure or other shapes.
  """
  wait(ckptr)
  damaged: dict[int, str] = {}
  for step in reversed(distributed.first(lambda: steps(ckptr.directory))):
    path = ckptr.directory / str(step)
    # Read once, not by every process.
    problem = distributed.first(functools.partial(_verify, path))
    if problem:
      damaged[step] = problem
      continue
    checked = distributed.first((path / CHECKSUMS).exists)
    try:
      state, record = distributed.together(
        functools.partial(_load, path, abstract_state, checked=checked)
      )
    except UserError as error:
      if checked:
        raise UserError(f"the checkpoint {path} does not fit: {error}") from error
      damaged[step] = str(error)
      continue
    if not checked:
      _log.warning("checkpoint of step %d restored, though without checksums", step)
      distributed.first(functools.partial(_write_checksums, path))
    _set_aside(ckptr, damaged, step)
    return Restored(step, state, record["data"], record["metadata"])
  found = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
  raise UserError(f"no good checkpoint in {ckptr.directory} ({found or 'it is empty'})")


def _load(path: Path, abstract_state: Any, *, checked: bool) -> tuple[Any, dict[str, Any]]:
  """The state and the record of a checkpoint.

  Raises:
    UserError: it cannot be read or does not fit.
    OSError: it cannot be read, though it was `checked` that it is whole: the machine's fault.
  """
  try:
    state = ocp.load_checkpointables(path, {"state": abstract_state})["state"]
    return state, ocp.metadata(path).custom_metadata
  except (OSError, ValueError, KeyError) as error:
    if checked and isinstance(error, OSError):
      raise
    raise UserError(_reason(error)) from error


class Good(NamedTuple):
  """A checkpoint whose files are as they were written."""

  step: int
  metadata: dict[str, Any]


def find_good(directory: str | Path, *, step: int | None = None) -> Good:
  """A checkpoint that can be trusted, for `restore_subtree`.

  Args:
    directory: the directory of steps.
    step: which one; by default the newest that is good.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  directory = Path(directory).absolute()
  found = steps(directory) if directory.is_dir() else []
  if not found or step not in (None, *found):
    which = "" if step is None else f" of step {step}, only of {found}"
    raise UserError(f"there is no checkpoint{which} in {directory}")
  problems = []
  for candidate in reversed(found) if step is None else (step,):
    path = directory / str(candidate)
    if not (path / CHECKSUMS).exists():
      problem: str | None = f"{CHECKSUMS} is missing"  # not finished yet, or cut short
    else:
      problem = _verify(path)
    if problem is None:
      return Good(candidate, ocp.metadata(path).custom_metadata["metadata"])
    problems.append(f"step {candidate}: {problem}")
    _log.warning("checkpoint of step %d is damaged (%s), not used", candidate, problem)
  raise UserError(f"no good checkpoint in {directory} ({'; '.join(problems)})")


def stored(directory: str | Path, step: int) -> dict[str, Any]:
  """What a checkpoint's arrays are, with `shape` and `dtype`, by their paths in the state."""
  path = Path(directory).absolute() / str(step)
  state = ocp.checkpointables_metadata(path).metadata["state"]
  leaves = jax.tree.leaves_with_path(state)
  return {"/".join(str(getattr(k, "key", k)) for k in keys): leaf for keys, leaf in leaves}


def restore_subtree(directory: str | Path, step: int, abstract: Any) -> Any:
  """Restores only a part of a state, such as its averaged parameters; changes nothing.

  Args:
    directory: the directory of steps.
    step: from `find_good`.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings by the state's field names.

  Raises:
    UserError: the checkpoint holds another structure or other shapes.
  """
  path = Path(directory).absolute() / str(step)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context:
      return ocp.load_checkpointables(path, {"state": abstract})["state"]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"the checkpoint {path} does not fit: {_reason(error)}") from error


def _reason(error: Exception) -> str:
  """The first line of what happened, which Orbax wraps in an error about its handlers."""
  return str(error.__cause__ or error).strip().partition("\n")[0].rstrip(":")


def _finish(ckptr: Checkpointer, path: Path, response: ocp.AsyncResponse) -> None:
  response.result()
  if distributed.is_first():
    _write_checksums(path)
    for step in steps(ckptr.directory)[: -ckptr.keep]:
      if step in ckptr.protected:
        continue
      try:
        _remove(ckptr.directory / str(step))
      except OSError as error:
        # The new checkpoint is whole; what cannot be removed only takes space.
        _log.warning("the old checkpoint of step %d stays: %s", step, error)


def _write_checksums(path: Path) -> None:
  write_json(path / CHECKSUMS, {name: _digest(path / name) for name in _files(path)})


def _files(path: Path) -> list[str]:
  files = (p for p in path.rglob("*") if p.is_file() and p.name != CHECKSUMS)
  return sorted(p.relative_to(path).as_posix() for p in files)


def _digest(file: Path) -> list[int]:
  """The size in bytes and the CRC-32 of a file."""
  crc = 0
  with file.open("rb") as stream:
    while chunk := stream.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return [file.stat().st_size, crc]


def _verify(path: Path) -> str | None:
  """What is wrong with the files of a checkpoint; nothing if it has no checksums."""
  try:
    checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except ValueError:
    return f"{CHECKSUMS} is unreadable"
  for name, (size, crc) in checksums.items():
    file = path / name
    if not file.exists():
      return f"{name} is missing"
    if file.stat().st_size != size:
      return f"{name} has {file.stat().st_size} of {size} bytes"
    if _digest(file) != [size, crc]:
      return f"{name} is altered"
  return None


def _set_aside(ckptr: Checkpointer, damaged: Mapping[int, str], good: int) -> None:
  """Renames damaged checkpoints, so that their steps can be saved again."""
  for step, problem in damaged.items():
    _log.warning(
      "checkpoint of step %d in %s is damaged (%s), going back to step %d",
      *(step, ckptr.directory, problem, good),
    )

  def rename() -> None:
    for step in damaged:
      target = ckptr.directory / f"{step}.damaged"
      if target.exists():
        shutil.rmtree(target)
      (ckptr.directory / str(step)).rename(target)

  distributed.first(rename)


def _remove(path: Path) -> None:
  # Renamed first: killed halfway, it must not be taken for a checkpoint.
  temporary = path.with_name(path.name + _TEMPORARY)
  path.rename(temporary)
  shutil.rmtree(temporary)


def _remove_temporary(directory: Path) -> None:
  for path in directory.glob(f"*{_TEMPORARY}"):
    # A failed save's threads may still write there; the next start cleans up.
    shutil.rmtree(path, ignore_errors=True)


def _raise_failure(ckptr: Checkpointer, step: int, error: Exception) -> None:
  """Removes what is there of a failed save and says in one line why it failed."""
  path = ckptr.directory / str(step)
  if distributed.is_first():
    if path.exists():
      _remove(path)
    _remove_temporary(ckptr.directory)
  # TensorStore reports the operating system's errors as ValueError.
  code = re.search(r"os_error_code='?(\d+)", str(error))
  if not (isinstance(error, OSError | UserError) or code):
    raise error
  number = int(code[1]) if code else getattr(error, "errno", None)
  full = number in _FULL or any(text in str(error) for text in _FULL_TEXTS)
  message = _not_written(
    ckptr, step, "no space left" if full else str(error).partition("\n")[0]
  )
  if full or isinstance(error, UserError):
    raise (UserError if full else type(error))(message) from error
  cause = error if isinstance(error, OSError) else OSError(number, message)
  raise storage_error(message, cause) from error


def _not_written(ckptr: Checkpointer, step: int, reason: str) -> str:
  latest = max(steps(ckptr.directory), default=None)  # of this process, which fails alone
  rest = "" if latest is None else f", the checkpoint of step {latest} is intact"
  return f"{reason} in {ckptr.directory}: step {step} was not written{rest}"


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
  # Orbax logs the traceback of each of its threads and then raises the error anyway.
  return not (record.levelno == logging.ERROR and "orbax" in record.pathname)
