"""The directory of a run, which holds one configuration, has one writer and is locked.

Also reads and writes a run's files: writes are atomic, and damaged files are reported or set
aside.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from jaxpref import base_config
from jaxpref import config as config_lib
from jaxpref.errors import DamagedError, UserError, storage_error
from jaxpref.runtime.paths import user_path

CONFIG, STARTS = "config.json", "starts.json"
LOCK = ".lock"
# Fields that say where inputs are. Inputs may move, because training compares the digests of
# their contents instead of their paths.
BY_CONTENT = (
  *("data.path", "data.split", "data.follow_links", "data.max_bad_share", "data.score"),
  *("model.path", "model.start", "steps.judge"),
)
# Fields and sections that may change when a run is resumed.
RESUME_SAFE = (
  *BY_CONTENT,
  *("alarms", "evaluate", "improve", "profile", "train.stop_on_hacking"),
  *("train.log_every", "train.num_updates", "train.keep"),
  *("train.max_skipped", "train.hang_minutes", "train.wandb"),
  "data.cache",  # checkpoints say how their rows were encoded, see `run_state.identify`
)
# Network and FUSE file systems without locks raise one of these errors.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_LARGEST_JSON = 1 << 28  # bytes; the record of ten million generated pairs is smaller
_DEEPEST_JSON = 50  # levels of nested lists and objects

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """An opened and locked directory of a run.

  Attributes:
    path: absolute path.
    resumed: whether the directory already held this run.
    lock: file descriptor that holds the lock until `release` or the end of the process.
  """

  path: Path
  resumed: bool
  lock: int


def path_of(given: str | None, config: ConfigDict) -> str:
  """Returns the path of a run's directory as the user gave it, or the default one.

  Raises:
    UserError: it is empty, or no checkpoint can be written there in this locale.
  """
  if given == "":
    raise UserError("--workdir is empty")
  path = str(given or default_workdir(config))
  try:
    path.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f"--workdir {path} has characters that this locale does not know: set LC_ALL=C.UTF-8"
    ) from error
  return path


def default_workdir(config: ConfigDict) -> Path:
  """Returns the directory of a run without `--workdir`: `runs/<name>-<preset>`."""
  return Path("runs") / f"{config.name}-{config.preset}"


def open_workdir(
  path: str | os.PathLike,
  config: ConfigDict,
  *,
  resume_safe: Iterable[str] = RESUME_SAFE,
) -> Workdir:
  """Creates or resumes the directory of a run and locks it.

  Args:
    path: the directory; it is created with its parents. It must be new, empty (except for
      names that begin with a dot) or hold a run with the same configuration.
    config: the run's configuration; a new run stores it in `config.json`.
    resume_safe: dotted names of the fields and sections that may differ from the stored
      configuration. A changed value is not stored here (see `write_config`).

  Returns:
    The locked directory.

  Raises:
    UserError: the directory is not writable, holds other files or a run with another
      configuration, or is locked by another process. Its contents are then unchanged.
  """
  if "://" in str(path):
    raise UserError(
      f"{path} is not a local path: only checkpoints can be in a bucket "
      "(--config.train.checkpoints=gs://...); or mount the bucket and use the mount's path"
    )
  path = user_path(path).absolute()
  make_writable(path)
  stored = path / CONFIG
  if not stored.exists() and (others := visible(path)):
    raise UserError(
      f"{path} is not empty ({', '.join(others[:3])}{', ...' if others[3:] else ''}) "
      f"and has no {CONFIG}: choose another --workdir"
    )
  lock = _lock(path)
  try:
    resumed = stored.exists()
    if resumed:
      check_same(path, config, resume_safe)
    else:
      write_config(path, config)
  except BaseException:
    os.close(lock)
    raise
  return Workdir(path=path, resumed=resumed, lock=lock)


def release(workdir: Workdir) -> None:
  """Releases the lock, which would otherwise last until the process ends."""
  os.close(workdir.lock)


def write_config(path: str | os.PathLike, config: ConfigDict) -> None:
  """Writes `config.json`; see `write_json`."""
  write_json(Path(path) / CONFIG, json.loads(config_lib.to_json(config)))


def add_start(path: str | os.PathLike, facts: Mapping[str, Any]) -> None:
  """Appends an entry to `starts.json`: the time and `facts` of this start or resumption."""
  file = Path(path) / STARTS
  starts = read_or_set_aside(file, _is_list_of_objects, missing=[])
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  write_json(file, [*starts, {"time": now, **facts}])


def read_starts(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the records of `add_start`; none if their file is missing."""
  file = Path(path) / STARTS
  return read_json(file, _is_list_of_objects) if file.exists() else []


def _is_list_of_objects(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def parse_json(data: bytes) -> Any:
  """Parses JSON in UTF-8.

  Raises:
    ValueError: the data are not JSON in UTF-8, or nested more than 50 levels deep.
  """
  try:
    value = json.loads(data.decode())
  except RecursionError:
    raise ValueError("nested too deeply") from None
  level = [value]
  for _ in range(_DEEPEST_JSON):
    inner = [v for v in level if isinstance(v, dict | list) and v]
    level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
    if not level:
      return value
  raise ValueError("nested too deeply")


def read_json(path: Path | epath.Path, is_valid: Callable[[Any], bool]) -> Any:
  """Reads a JSON file of a run.

  Args:
    path: the file.
    is_valid: tells whether a value has the structure that the caller relies on.

  Raises:
    DamagedError: the file is missing, not a regular file, too large, not UTF-8, not JSON, or
      its value is not valid.
    UserError: the storage fails to read it.
  """
  if "://" not in os.fspath(path):
    path = Path(path)  # `is_file` of `etils` is true for a pipe, too
  try:
    # Before opening: opening a pipe would wait for a writer.
    if not path.is_file():
      there = path.exists() or (isinstance(path, Path) and path.is_symlink())
      raise DamagedError(f"{path} is {'not a regular file' if there else 'missing'}")
    about: Any = path.stat()
    size = about.st_size if isinstance(path, Path) else about.length  # the name in `etils`
    if size > _LARGEST_JSON:
      raise DamagedError(
        f"{path} is damaged: it has {size:,} bytes, more than {_LARGEST_JSON:,}"
      )
    value = parse_json(path.read_bytes())
  except OSError as error:
    raise storage_error(f"cannot read {path}: {error.strerror or error}", error) from error
  except ValueError as error:
    raise DamagedError(f"{path} is damaged: {error}") from error
  if not is_valid(value):
    raise DamagedError(f"{path} is damaged: its values are not those that a run writes")
  return value


def read_or_set_aside(
  path: Path, is_valid: Callable[[Any], bool], *, missing: Any = None
) -> Any:
  """Reads a JSON file like `read_json`, but sets a damaged file aside.

  Returns:
    The value, or `missing` if the file does not exist or was damaged.
  """
  if not os.path.lexists(path):
    return missing
  try:
    return read_json(path, is_valid)
  except DamagedError as error:
    set_aside(path, str(error))
    return missing


def set_aside(path: Path, reason: str) -> None:
  """Renames a damaged file or directory to `<name>.damaged` and logs a warning.

  Replaces an earlier `<name>.damaged`.

  Args:
    path: the file or directory.
    reason: what is wrong with it, for the warning.

  Raises:
    UserError: it cannot be renamed.
  """
  target = path.with_name(f"{path.name}.damaged")
  try:
    if target.is_dir() and not target.is_symlink():
      shutil.rmtree(target)
    path.replace(target)
  except OSError as error:
    raise storage_error(f"cannot rename {path}: {error.strerror}", error) from error
  _log.warning("%s; it is now %s", reason, target.name)


def write_json(path: str | os.PathLike, obj: Any) -> None:
  """Writes JSON (indent 2) atomically; see `write_bytes`."""
  write_text(path, json.dumps(obj, indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text file atomically; see `write_bytes`."""
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file atomically: a reader sees the complete old or the complete new file.

  Raises:
    UserError: the file cannot be written, for example because the disk is full.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:  # "x": fails instead of writing through a link
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise storage_error(f"cannot write {path}: {error.strerror}", error) from error


def make_writable(path: Path) -> None:
  """Makes a directory if it does not exist, and tries to write into it.

  Raises:
    UserError: the path is a file, or the directory is not writable.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    # Permission bits are not enough: root passes them even on a read-only mount.
    with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-"):
      pass
  except FileExistsError as error:
    raise UserError(f"{path} is a file, not a directory") from error
  except OSError as error:
    raise storage_error(f"cannot write to {path}: {error.strerror}", error) from error


def visible(path: Path | epath.Path) -> list[str]:
  """Lists the names in a directory that do not begin with a dot, sorted."""
  return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


def _lock(path: Path) -> int:
  """Locks a directory by its `.lock` file; returns the file's descriptor."""
  # The owner is written into the file, which must not overwrite the target of a link.
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
  foreign = f"cannot lock {path}: {LOCK} is a link or not a regular file: remove it"
  try:
    descriptor = os.open(path / LOCK, flags, 0o644)
  except OSError as error:
    if error.errno in (errno.ELOOP, errno.ENXIO):
      raise UserError(foreign) from error
    raise UserError(f"cannot lock {path}: {error.strerror}") from error
  about = os.fstat(descriptor)
  if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
    os.close(descriptor)
    raise UserError(foreign)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    owner = os.pread(descriptor, 256, 0).decode(errors="replace").strip()
    os.close(descriptor)
    raise UserError(
      f"{path} is in use by process {owner or '(unknown)'}: wait for it or choose "
      "another --workdir"
    ) from error
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      os.close(descriptor)
      raise UserError(f"cannot lock {path}: {error.strerror}") from error
    _log.warning(
      "%s is on a file system without file locks: do not start a second run in it", path
    )
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
  return descriptor


def check_same(
  path: Path | epath.Path,
  config: ConfigDict,
  resume_safe: Iterable[str],
  *,
  choose: str = "--workdir",
) -> None:
  """Refuses a directory with the `config.json` of another run.

  Args:
    path: the directory.
    config: the configuration of this run.
    resume_safe: fields and sections that may differ (see `open_workdir`).
    choose: the flag or field that the error message tells the user to change.

  Raises:
    UserError: a field differs, or the file cannot be read.
  """
  resume_safe = tuple(resume_safe)
  try:
    old = _flat(read_json(path / CONFIG, lambda value: isinstance(value, dict)))
  except DamagedError as error:
    raise UserError(f"{path / CONFIG} cannot be read: {error}") from error
  new = _flat(json.loads(config_lib.to_json(config)))
  # Fields that are newer than the run: it did what they do by default.
  if (preset := new.get("preset")) in base_config.PRESETS:
    defaults = _flat(json.loads(config_lib.to_json(base_config.base(str(new["name"]), preset))))
    old = {field: defaults[field] for field in new.keys() & defaults.keys()} | old
  changed = [
    field
    for field in sorted(old.keys() | new.keys())
    if old.get(field, "absent") != new.get(field, "absent")
    and not any(f"{field}.".startswith(f"{safe}.") for safe in resume_safe)
  ]
  if changed:
    field, *others = changed
    more = f" (and {len(others)} more)" if others else ""
    raise UserError(
      f"{path} holds another run: {field} was {old.get(field, 'absent')}, "
      f"now {new.get(field, 'absent')}{more}: choose another {choose}"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested mappings to dotted names."""
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      leaves |= _flat(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves
