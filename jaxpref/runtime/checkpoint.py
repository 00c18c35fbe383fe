"""Checkpoints of a run: written while training goes on, checked before they are trusted.

`<directory>/<step>/` is one Orbax checkpoint, to which every process of a run adds its
part. Orbax writes it under a temporary name and renames it when it is whole; then
`checksums.json` is added, so that a file that was lost, cut or altered later is noticed at
the restore, which goes back to the newest good step. What is otherwise in a bucket is said in
`jaxpref.runtime.storage`.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging as absl_logging
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from jaxpref import config as config_lib
from jaxpref.errors import (
  DamagedError,
  TransientError,
  UserError,
  first_line,
  storage_error,
)
from jaxpref.paths import number_of, user_path
from jaxpref.runtime import distributed, storage
from jaxpref.runtime.workdir import CONFIG, check_same, read_json, visible

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

  directory: epath.Path
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


def directory_of(workdir: Path, config: Mapping[str, Any]) -> epath.Path:
  """Where a run's checkpoints are: `train.checkpoints`, or in its workdir.

  Raises:
    UserError: `train.checkpoints` is neither an absolute path nor `gs://BUCKET/...`.
  """
  where = config["train"].get("checkpoints", "")
  if not where:
    return storage.place(workdir / "checkpoints")
  if "://" not in where and not user_path(where).is_absolute():
    raise UserError(f"train.checkpoints must be absolute or {storage.SCHEME}..., got {where}")
  return storage.place(where)


def open_checkpointer(
  directory: str | os.PathLike,
  *,
  keep: int,
  owner: ConfigDict | None = None,
  resume_safe: Iterable[str] = (),
) -> Checkpointer:
  """Makes the directory and removes what a killed save has left half-written.

  Args:
    directory: one run's checkpoints, a local path or `gs://...`; no other process may write
      there.
    keep: how many of the newest checkpoints stay, at least 1.
    owner: the run's configuration, for a directory that is not in its workdir.
    resume_safe: fields in which it may differ from that of the run's beginning.

  Raises:
    UserError: the directory cannot be made, the bucket not be reached, or it is another
      run's or holds something else; nothing in it has been changed then.
  """
  if keep < 1:
    raise ValueError(f"keep must be at least 1, got {keep}")
  absl_logging.get_absl_logger().addFilter(_is_not_orbax_error)
  root = storage.place(directory)

  def make() -> None:
    try:
      root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"cannot write to {root}: {error.strerror or error}") from error
    if owner is not None:
      _check_owner(root, owner, resume_safe)
    _remove_temporary(root)
    if others := _other_names(root):
      _log.warning("%s: passed over, not named after a step: %s", root, ", ".join(others))

  _first(root, make)
  return Checkpointer(root, keep, [], futures.ThreadPoolExecutor(1), [])


def _check_owner(directory: epath.Path, config: ConfigDict, resume_safe: Iterable[str]) -> None:
  """Makes a directory that is not in a workdir this run's, by `config.json` in it."""
  stored = directory / CONFIG
  if stored.exists():
    check_same(directory, config, resume_safe, choose="train.checkpoints")
    return
  if directory.exists() and visible(directory):
    choose = "choose another train.checkpoints"
    raise UserError(f"{directory} is not empty and no run's; {choose}")
  storage.write(stored, config_lib.to_json(config) + "\n")


def steps(directory: str | os.PathLike) -> list[int]:
  """The steps of the finished checkpoints, ascending; good or not."""
  root = storage.place(directory)
  with storage.failures_of(root):
    if storage.is_bucket(root) and not root.exists():
      return []  # a bucket has no empty directories
    entries = ((number_of(p.name), p) for p in root.iterdir())
    return sorted(n for n, p in entries if n is not None and storage.is_whole(p))


def _other_names(directory: epath.Path) -> list[str]:
  """Names that neither a run nor Orbax gives, such as 007 and '5 (copy)'."""
  if not directory.exists():  # a bucket has no empty directories
    return []
  names = (name for name in visible(directory) if number_of(name) is None)
  return [
    n for n in names if n != CONFIG and not n.endswith(".damaged") and _TEMPORARY not in n
  ]


def protect(ckptr: Checkpointer, step: int) -> None:
  """Keeps the checkpoint of this step, in the place of the one that was kept before."""
  ckptr.protected[:] = [step]


def latest_step(ckptr: Checkpointer) -> int | None:
  """The newest finished checkpoint's step, if any."""
  return _first(ckptr.directory, lambda: max(steps(ckptr.directory), default=None))


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
  record = {"step": step, "data": data_state, "metadata": dict(metadata)}
  if json.loads(json.dumps(record)) != record:
    raise ValueError(f"data_state and metadata must survive JSON, got {record}")
  needed = math.ceil(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))

  def check() -> bool:
    if path.exists():
      return False
    if storage.is_bucket(ckptr.directory):
      return True
    free = shutil.disk_usage(ckptr.directory).free
    if free < needed:
      sizes = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
      raise UserError(_not_written(ckptr, step, f"no space left ({sizes})"))
    return True

  if not _first(ckptr.directory, check):
    raise ValueError(f"step {step} is already saved in {ckptr.directory}")
  try:
    response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=record)
  except Exception as error:
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
    except Exception as error:  # of a bucket's clients they are of many kinds
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
  for step in reversed(_first(ckptr.directory, lambda: steps(ckptr.directory))):
    path = ckptr.directory / str(step)
    # Read once, not by every process.
    problem = _first(path, functools.partial(_verify, path))
    if problem:
      damaged[step] = problem
      continue
    checked = _first(path, (path / CHECKSUMS).exists)
    try:
      state, record = distributed.together(
        functools.partial(_load, path, abstract_state, checked=checked)
      )
    except UserError as error:
      if error.status == TransientError.status:
        raise
      if checked:
        raise UserError(f"the checkpoint {path} does not fit: {error}") from error
      damaged[step] = str(error)
      continue
    if problem := _wrong_record(record, step):
      damaged[step] = problem
      continue
    if not checked:
      _log.warning("checkpoint of step %d restored, though without checksums", step)
      _first(path, functools.partial(_write_checksums, path))
    _set_aside(ckptr, damaged, step)
    return Restored(step, state, record["data"], record["metadata"])
  found = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
  raise UserError(f"no good checkpoint in {ckptr.directory} ({found or 'it is empty'})")


def _first(where: epath.Path, job: Callable[[], Any]) -> Any:
  """Does a job on process 0 alone; a bucket's failure in it is everyone's error, too."""

  def guarded() -> Any:
    with storage.failures_of(where):
      return job()

  return distributed.first(guarded)


def _load(
  path: epath.Path, abstract_state: Any, *, checked: bool
) -> tuple[Any, dict[str, Any]]:
  """The state and the record of a checkpoint.

  Raises:
    UserError: it cannot be read or does not fit.
    OSError: it cannot be read, though it was `checked` that it is whole: the machine's fault.
  """
  try:
    state = ocp.load_checkpointables(path, {"state": abstract_state})["state"]
    return state, ocp.metadata(path).custom_metadata
  except Exception as error:
    storage.raise_passing(path, error)
    if not isinstance(error, OSError | ValueError | KeyError) or (
      checked and isinstance(error, OSError)
    ):
      raise
    raise UserError(_reason(error)) from error


class Good(NamedTuple):
  """A checkpoint whose files are as they were written."""

  step: int
  metadata: dict[str, Any]


def find_good(directory: str | os.PathLike, *, step: int | None = None) -> Good:
  """A checkpoint that can be trusted, for `restore_subtree`.

  Args:
    directory: the directory of steps.
    step: which one; by default the newest that is good.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  root = storage.place(directory)
  found = steps(root) if storage.is_bucket(root) or root.is_dir() else []
  if not found or step not in (None, *found):
    which = "" if step is None else f" of step {step}, only of {found}"
    raise UserError(f"there is no checkpoint{which} in {root}")
  problems = []
  for candidate in reversed(found) if step is None else (step,):
    path = root / str(candidate)
    with storage.failures_of(path):
      if not (path / CHECKSUMS).exists():
        problem: str | None = f"{CHECKSUMS} is missing"  # not finished yet, or cut short
      else:
        problem = _verify(path)
      if problem is None:
        record = ocp.metadata(path).custom_metadata
        problem = _wrong_record(record, candidate)
      if problem is None:
        return Good(candidate, record["metadata"])
    problems.append(f"step {candidate}: {problem}")
    _log.warning("checkpoint of step %d is damaged (%s), not used", candidate, problem)
  raise UserError(f"no good checkpoint in {root} ({'; '.join(problems)})")


def stored(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """What a checkpoint's arrays are, with `shape` and `dtype`, by their paths in the state."""
  path = storage.place(directory) / str(step)
  with storage.failures_of(path):
    state = ocp.checkpointables_metadata(path).metadata["state"]
  leaves = jax.tree.leaves_with_path(state)
  return {"/".join(str(getattr(k, "key", k)) for k in keys): leaf for keys, leaf in leaves}


def restore_subtree(directory: str | os.PathLike, step: int, abstract: Any) -> Any:
  """Restores only a part of a state, such as its averaged parameters; changes nothing.

  Args:
    directory: the directory of steps.
    step: from `find_good`.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings by the state's field names.

  Raises:
    UserError: the checkpoint holds another structure or other shapes.
  """
  path = storage.place(directory) / str(step)
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context:
      return ocp.load_checkpointables(path, {"state": abstract})["state"]
  except Exception as error:
    storage.raise_passing(path, error)
    if not isinstance(error, OSError | ValueError | KeyError):
      raise
    raise UserError(f"the checkpoint {path} does not fit: {_reason(error)}") from error


def _reason(error: Exception) -> str:
  """The first line of what happened, which Orbax wraps in an error about its handlers."""
  return first_line(error.__cause__ or error).rstrip(":")


def _finish(ckptr: Checkpointer, path: epath.Path, response: ocp.AsyncResponse) -> None:
  response.result()
  if distributed.is_first():
    _write_checksums(path)
    for step in steps(ckptr.directory)[: -ckptr.keep]:
      if step in ckptr.protected:
        continue
      try:
        _remove(ckptr.directory / str(step))
      except Exception as error:
        # The new checkpoint is whole; what cannot be removed only takes space.
        _log.warning("the old checkpoint of step %d stays: %s", step, error)


def _write_checksums(path: epath.Path) -> None:
  found = {
    name: [storage.size(path / name), storage.checksum(path / name)]
    for name in storage.files(path)
    if name != CHECKSUMS
  }
  storage.write(path / CHECKSUMS, json.dumps(found, indent=2) + "\n")


def _verify(path: epath.Path) -> str | None:
  """What is wrong with the files of a checkpoint; nothing if it has no checksums."""
  if not (path / CHECKSUMS).exists():
    return None
  try:
    checksums = read_json(path / CHECKSUMS, _are_checksums)
  except DamagedError:
    return f"{CHECKSUMS} is unreadable"
  if unlisted := set(storage.files(path)) - {CHECKSUMS, *checksums}:
    return f"{min(unlisted)} has no checksum"
  problems = (_verify_file(path, name, *about) for name, about in checksums.items())
  return next((problem for problem in problems if problem), None)


def _verify_file(path: epath.Path, name: str, size: int, checksum: Any) -> str | None:
  file = path / name
  if not storage.is_file(file):
    return f"{name} is missing"
  if (found := storage.size(file)) != size:
    return f"{name} has {found} of {size} bytes"
  return f"{name} is altered" if storage.checksum(file) != checksum else None


def _are_checksums(value: Any) -> bool:
  """Whether these are sizes and checksums by names of files in the checkpoint."""
  return isinstance(value, dict) and all(
    isinstance(about, list)
    and len(about) == 2
    and isinstance(about[0], int)
    and isinstance(about[1], int | str)
    and not name.startswith("/")
    and "\0" not in name
    and ".." not in name.split("/")
    for name, about in value.items()
  )


def _wrong_record(record: Any, step: int) -> str | None:
  """What is wrong with a checkpoint's record, of which older versions lack the step."""
  if not isinstance(record, dict) or not isinstance(record.get("metadata"), dict):
    return "its record is damaged"
  if (saved := record.get("step", step)) != step:
    return f"it was saved as that of step {saved}"
  return None if "data" in record else "its record is damaged"


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
      storage.clear(target)
      storage.move(ckptr.directory / str(step), target)

  _first(ckptr.directory, rename)


def _remove(path: epath.Path) -> None:
  # Killed halfway, it must not be taken for a checkpoint.
  if storage.is_bucket(path):
    (path / storage.MARK).unlink(missing_ok=True)
  else:
    path = path.rename(path.with_name(path.name + _TEMPORARY))
  path.rmtree()


def _remove_temporary(directory: epath.Path) -> None:
  if storage.is_bucket(directory):
    entries = directory.iterdir() if directory.exists() else ()
    numbered = (p for p in entries if number_of(p.name) is not None)
    left = [p for p in numbered if not storage.is_whole(p)]
  else:
    left = list(directory.glob(f"*{_TEMPORARY}"))
  for path in left:
    # A failed save's threads may still write there; the next start cleans up.
    with contextlib.suppress(OSError):
      path.rmtree()


def _raise_failure(ckptr: Checkpointer, step: int, error: Exception) -> None:
  """Removes what is there of a failed save and says in one line why it failed."""
  path = ckptr.directory / str(step)
  if storage.is_bucket(path):
    # What is there has no mark, and goes at the next start: now the bucket may not answer.
    where = f"in {ckptr.directory}: step {step} was not written"
    raise TransientError(f"{first_line(error)} {where}") from error
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
