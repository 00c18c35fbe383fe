"""Checkpoints of a run: saved asynchronously, verified before they are restored.

`<directory>/<step>/` is one Orbax checkpoint, to which every process of a run adds its part.
Orbax writes it under a temporary name and renames it once it is complete. Then
`checksums.json` is added, so that a restore detects files that were lost, truncated or altered
later, and falls back to the newest good step. `jaxpref.runtime.storage` describes how buckets
differ.
"""

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
from jaxpref.errors import TransientError, UserError, first_line, storage_error
from jaxpref.runtime import checkpoint_files, distributed, storage
from jaxpref.runtime.paths import user_path
from jaxpref.runtime.workdir import CONFIG, check_same, visible

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "quota exceeded")

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """The arguments of the `Checkpointer.save` that wrote a checkpoint."""

  step: int
  state: Any
  data_state: Any
  metadata: dict[str, Any]


def directory_of(workdir: Path, config: Mapping[str, Any]) -> epath.Path:
  """Returns the directory of a run's checkpoints: `train.checkpoints`, or in its workdir.

  Raises:
    UserError: `train.checkpoints` is neither an absolute path nor `gs://BUCKET/...`.
  """
  where = config["train"].get("checkpoints", "")
  if not where:
    return storage.place(workdir / "checkpoints")
  if "://" not in where and not user_path(where).is_absolute():
    raise UserError(
      f"train.checkpoints must be an absolute path or {storage.SCHEME}BUCKET/... (got {where})"
    )
  return storage.place(where)


class Checkpointer:
  """The checkpoints of one run.

  The constructor makes the directory and removes the files of an interrupted save.

  Args:
    directory: a local path or `gs://...`, for one run; no other process may write there.
    keep: number of newest checkpoints to keep, at least 1.
    owner: the run's configuration, for a directory outside of its workdir.
    resume_safe: fields of `owner` that may differ from the run's first start.

  Raises:
    UserError: the directory cannot be made or reached, or it has the checkpoints of another
      run or other files. Its contents are then unchanged.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int,
    owner: ConfigDict | None = None,
    resume_safe: Iterable[str] = (),
  ):
    if keep < 1:
      raise ValueError(f"keep must be at least 1 (got {keep})")
    absl_logging.get_absl_logger().addFilter(_is_not_orbax_error)
    self.directory = storage.place(directory)
    self._keep = keep
    self._protected: int | None = None
    self._worker = futures.ThreadPoolExecutor(1)  # finishes saves
    self._pending: tuple[int, futures.Future] | None = None  # the save under way
    _first(self.directory, lambda: _make(self.directory, owner, resume_safe))

  def protect(self, step: int) -> None:
    """Keeps the checkpoint of this step at any age; replaces the previously protected step."""
    self._protected = step

  def latest_step(self) -> int | None:
    """Returns the newest finished checkpoint's step, if any."""
    steps = lambda: max(checkpoint_files.steps(self.directory), default=None)  # noqa: E731
    return _first(self.directory, steps)

  def save(self, step: int, state: Any, data_state: Any, metadata: Mapping[str, Any]) -> None:
    """Starts a save and returns once `state` is copied, so that it may be donated.

    Waits for the previous save first and raises its failure.

    Args:
      step: number of updates made; must not have been saved before.
      state: pytree of `jax.Array`; may contain typed keys.
      data_state: position in the data, as JSON (a grain iterator's `get_state()`).
      metadata: other values to store, as JSON.

    Raises:
      UserError: this or the previous checkpoint could not be written (disk full, ...). Its
        files are removed, and earlier checkpoints are intact.
    """
    self.wait()
    path = self.directory / str(step)
    record = {"step": step, "data": data_state, "metadata": dict(metadata)}
    if json.loads(json.dumps(record)) != record:
      raise ValueError(f"data_state and metadata must survive JSON (got {record})")
    needed = math.ceil(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    if not _first(self.directory, lambda: self._has_room(step, needed)):
      raise ValueError(f"step {step} is already saved in {self.directory}")
    try:
      response = ocp.save_checkpointables_async(path, {"state": state}, custom_metadata=record)
    except Exception as error:
      self._raise_failure(step, error)
    self._pending = step, self._worker.submit(self._finish, path, response)

  def wait(self) -> None:
    """Waits until the save under way is finished.

    Raises:
      UserError: it could not be written; see `save`.
    """
    distributed.together(self._wait)

  def close(self) -> None:
    """Waits like `wait`, but only for this process, and ends the worker thread."""
    try:
      self._wait()
    finally:
      self._worker.shutdown()

  def restore(self, abstract_state: Any) -> Restored:
    """Restores the newest good checkpoint.

    Damaged newer checkpoints are named in a warning and renamed to `<step>.damaged`.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      (step, state, data_state, metadata); the arrays equal the saved ones bit for bit.

    Raises:
      UserError: every checkpoint is damaged (the message lists them), or the newest good one
        has a different structure or different shapes.
    """
    self.wait()
    damaged: dict[int, str] = {}
    found = _first(self.directory, lambda: checkpoint_files.steps(self.directory))
    for step in reversed(found):
      path = self.directory / str(step)
      # Only process 0 reads the files.
      problem = _first(path, functools.partial(checkpoint_files.verify, path))
      if problem:
        damaged[step] = problem
        continue
      checked = _first(path, (path / checkpoint_files.CHECKSUMS).exists)
      try:
        state, record = distributed.together(
          functools.partial(checkpoint_files.load, path, abstract_state, checked=checked)
        )
      except UserError as error:
        if error.status == TransientError.status:
          raise
        if checked:
          raise UserError(f"the checkpoint {path} does not fit: {error}") from error
        damaged[step] = str(error)
        continue
      if problem := checkpoint_files.wrong_record(record, step):
        damaged[step] = problem
        continue
      if not checked:
        _log.warning("checkpoint of step %d restored, although it has no checksums", step)
        _first(path, functools.partial(checkpoint_files.write_checksums, path))
      self._set_aside(damaged, step)
      return Restored(step, state, record["data"], record["metadata"])
    problems = "; ".join(f"step {step}: {text}" for step, text in damaged.items())
    raise UserError(f"no good checkpoint in {self.directory} ({problems or 'it is empty'})")

  def _has_room(self, step: int, needed: int) -> bool:
    """Tells whether a step is new.

    Raises:
      UserError: the disk has less than `needed` bytes.
    """
    if (self.directory / str(step)).exists():
      return False
    if storage.is_bucket(self.directory):
      return True
    free = shutil.disk_usage(self.directory).free
    if free < needed:
      sizes = f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
      raise UserError(self._not_written(step, f"no space left ({sizes})"))
    return True

  def _wait(self) -> None:
    pending, self._pending = self._pending, None
    if pending:
      step, future = pending
      try:
        future.result()
      except Exception as error:  # clients of buckets raise errors of many types
        self._raise_failure(step, error)

  def _finish(self, path: epath.Path, response: ocp.AsyncResponse) -> None:
    """Completes a save in the worker thread and removes old checkpoints."""
    response.result()
    if not distributed.is_first():
      return
    checkpoint_files.write_checksums(path)
    for step in checkpoint_files.steps(self.directory)[: -self._keep]:
      if step == self._protected:
        continue
      try:
        checkpoint_files.remove(self.directory / str(step))
      except Exception as error:
        # The new checkpoint is complete, and the old one only takes space.
        _log.warning("cannot remove the old checkpoint of step %d: %s", step, error)

  def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again."""
    for step, problem in damaged.items():
      _log.warning(
        "checkpoint of step %d in %s is damaged (%s), going back to step %d",
        *(step, self.directory, problem, good),
      )

    def rename() -> None:
      for step in damaged:
        target = self.directory / f"{step}.damaged"
        storage.clear(target)
        storage.move(self.directory / str(step), target)

    _first(self.directory, rename)

  def _raise_failure(self, step: int, error: Exception) -> None:
    """Removes the files of a failed save and raises a one-line error."""
    path = self.directory / str(step)
    if storage.is_bucket(path):
      # The bucket may not answer now. The files lack the mark, so the next start removes them.
      where = f"in {self.directory}: step {step} was not written"
      raise TransientError(f"{first_line(error)} {where}") from error
    if distributed.is_first():
      if path.exists():
        checkpoint_files.remove(path)
      checkpoint_files.remove_temporary(self.directory)
    # TensorStore reports the operating system's errors as ValueError.
    code = re.search(r"os_error_code='?(\d+)", str(error))
    if not (isinstance(error, OSError | UserError) or code):
      raise error
    number = int(code[1]) if code else getattr(error, "errno", None)
    full = number in _FULL or any(text in str(error) for text in _FULL_TEXTS)
    reason = "no space left" if full else str(error).partition("\n")[0]
    message = self._not_written(step, reason)
    if full or isinstance(error, UserError):
      raise (UserError if full else type(error))(message) from error
    cause = error if isinstance(error, OSError) else OSError(number, message)
    raise storage_error(message, cause) from error

  def _not_written(self, step: int, reason: str) -> str:
    # Possibly only this process has failed, so it must not wait for the others here.
    latest = max(checkpoint_files.steps(self.directory), default=None)
    rest = "" if latest is None else f", the checkpoint of step {latest} is intact"
    return f"{reason} in {self.directory}: step {step} was not written{rest}"


def _make(directory: epath.Path, owner: ConfigDict | None, resume_safe: Iterable[str]) -> None:
  """Makes the directory, or checks the one that exists and cleans it."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
  if owner is not None:
    _check_owner(directory, owner, resume_safe)
  checkpoint_files.remove_temporary(directory)
  if others := checkpoint_files.other_names(directory):
    _log.warning(
      "%s: ignored these names, because they are not steps: %s", directory, ", ".join(others)
    )


def _check_owner(directory: epath.Path, config: ConfigDict, resume_safe: Iterable[str]) -> None:
  """Marks a directory outside of the workdir as this run's, by a `config.json` in it."""
  stored = directory / CONFIG
  if stored.exists():
    check_same(directory, config, resume_safe, choose="train.checkpoints")
    return
  if directory.exists() and visible(directory):
    raise UserError(
      f"{directory} is not empty and has no {CONFIG}: choose another train.checkpoints"
    )
  storage.write(stored, config_lib.to_json(config) + "\n")


def _first(where: epath.Path, job: Callable[[], Any]) -> Any:
  """Runs a job on process 0 only; a bucket's failure there is raised on all processes."""

  def guarded() -> Any:
    with storage.failures_of(where):
      return job()

  return distributed.first(guarded)


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
  """Drops the tracebacks that Orbax logs in its threads, because it also raises the errors."""
  return not (record.levelno == logging.ERROR and "orbax" in record.pathname)
