"""Operations on finished checkpoints on disk or in a bucket: list, verify, read, remove.

`<directory>/<step>/` is one Orbax checkpoint. `checksums.json` in it has the size and the
checksum of every other file.
"""

import contextlib
import json
import logging
import os
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxpref.errors import DamagedError, UserError, first_line
from jaxpref.runtime import storage
from jaxpref.runtime.paths import number_of
from jaxpref.runtime.workdir import CONFIG, read_json, visible

CHECKSUMS = "checksums.json"
TEMPORARY = ".orbax-checkpoint-tmp"

_log = logging.getLogger(__name__)


def steps(directory: str | os.PathLike) -> list[int]:
  """Lists the steps of finished checkpoints, ascending, damaged ones included."""
  root = storage.place(directory)
  with storage.failures_of(root):
    if storage.is_bucket(root) and not root.exists():
      return []  # a bucket has no empty directories
    entries = ((number_of(p.name), p) for p in root.iterdir())
    return sorted(n for n, p in entries if n is not None and storage.is_whole(p))


def other_names(directory: epath.Path) -> list[str]:
  """Lists names in the directory that neither a run nor Orbax writes, such as '5 (copy)'."""
  if not directory.exists():  # a bucket has no empty directories
    return []
  names = (name for name in visible(directory) if number_of(name) is None)
  return [n for n in names if n != CONFIG and not n.endswith(".damaged") and TEMPORARY not in n]


class Good(NamedTuple):
  """A checkpoint whose files have not changed since they were written."""

  step: int
  metadata: dict[str, Any]


def find_good(directory: str | os.PathLike, *, step: int | None = None) -> Good:
  """Finds and verifies a checkpoint, for `restore_subtree`.

  Args:
    directory: the directory of steps.
    step: the step to verify; by default, the newest good checkpoint is found.

  Raises:
    UserError: the checkpoint does not exist or is damaged, or every checkpoint is.
  """
  root = storage.place(directory)
  found = steps(root) if storage.is_bucket(root) or root.is_dir() else []
  if not found or step not in (None, *found):
    which = "" if step is None else f" of step {step}"
    others = f"; the steps are {found}" if found else ""
    raise UserError(f"cannot find a checkpoint{which} in {root}{others}")
  problems = []
  for candidate in reversed(found) if step is None else (step,):
    path = root / str(candidate)
    with storage.failures_of(path):
      if not (path / CHECKSUMS).exists():
        problem: str | None = f"{CHECKSUMS} is missing"  # unfinished
      else:
        problem = verify(path)
      if problem is None:
        record = ocp.metadata(path).custom_metadata
        problem = wrong_record(record, candidate)
      if problem is None:
        return Good(candidate, record["metadata"])
    problems.append(f"step {candidate}: {problem}")
    _log.warning("skipped the checkpoint of step %d, which is damaged: %s", candidate, problem)
  raise UserError(f"no good checkpoint in {root} ({'; '.join(problems)})")


def stored(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """Returns the arrays' `shape` and `dtype` by their paths in the state."""
  path = storage.place(directory) / str(step)
  with storage.failures_of(path):
    state = ocp.checkpointables_metadata(path).metadata["state"]
  leaves = jax.tree.leaves_with_path(state)
  return {"/".join(str(getattr(k, "key", k)) for k in keys): leaf for keys, leaf in leaves}


def restore_subtree(directory: str | os.PathLike, step: int, abstract: Any) -> Any:
  """Restores a part of a state, such as its EMA weights; changes nothing on disk.

  Args:
    directory: the directory of steps.
    step: a step that `find_good` verified.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings; its keys are the state's
      field names.

  Raises:
    UserError: the checkpoint has a different structure or different shapes.
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


def load(path: epath.Path, abstract_state: Any, *, checked: bool) -> tuple[Any, dict[str, Any]]:
  """Loads the state and the record of a checkpoint.

  Args:
    path: the checkpoint.
    abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings.
    checked: whether its checksums were verified.

  Raises:
    UserError: the checkpoint cannot be read or has a different structure.
    OSError: a `checked` checkpoint cannot be read, so the storage fails, not the checkpoint.
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


def _reason(error: Exception) -> str:
  """Returns the first line of the cause; Orbax wraps it in an error about its handlers."""
  return first_line(error.__cause__ or error).rstrip(":")


def write_checksums(path: epath.Path) -> None:
  """Writes the sizes and checksums of a checkpoint's files beside them."""
  found = {
    name: [storage.size(path / name), storage.checksum(path / name)]
    for name in storage.files(path)
    if name != CHECKSUMS
  }
  storage.write(path / CHECKSUMS, json.dumps(found, indent=2) + "\n")


def verify(path: epath.Path) -> str | None:
  """Says what is wrong with a checkpoint's files, or None; None without checksums, too."""
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
  """Tells whether a JSON value maps names of files to their sizes and checksums."""
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


def wrong_record(record: Any, step: int) -> str | None:
  """Says what is wrong with a checkpoint's record, or None; old records lack the step."""
  if not isinstance(record, dict) or not isinstance(record.get("metadata"), dict):
    return "its record is damaged"
  if (saved := record.get("step", step)) != step:
    return f"it was saved as step {saved}"
  return None if "data" in record else "its record is damaged"


def remove(path: epath.Path) -> None:
  """Removes a checkpoint."""
  # First make sure that an interrupted removal cannot leave a checkpoint that looks complete.
  if storage.is_bucket(path):
    (path / storage.MARK).unlink(missing_ok=True)
  else:
    path = path.rename(path.with_name(path.name + TEMPORARY))
  path.rmtree()


def remove_temporary(directory: epath.Path) -> None:
  """Removes the files of interrupted saves."""
  if storage.is_bucket(directory):
    entries = directory.iterdir() if directory.exists() else ()
    numbered = (p for p in entries if number_of(p.name) is not None)
    left = [p for p in numbered if not storage.is_whole(p)]
  else:
    left = list(directory.glob(f"*{TEMPORARY}"))
  for path in left:
    # Threads of a failed save may still write there; the next start removes the rest.
    with contextlib.suppress(OSError):
      path.rmtree()
