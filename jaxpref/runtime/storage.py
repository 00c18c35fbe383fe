"""Where checkpoints are: a directory of this machine, or of a bucket, `gs://...`.

A bucket's objects cannot be renamed together, so a checkpoint there is whole when Orbax has
added its mark. Each object carries the checksum that Google keeps of it, which is asked for
instead of reading all of it again.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxpref.errors import TransientError, UserError, first_line
from jaxpref.runtime.paths import user_path
from jaxpref.runtime.workdir import write_text

SCHEME = "gs://"
MARK = "commit_success.txt"  # Orbax's, of a whole checkpoint in a bucket
# TensorStore reports these as ValueError.
_PASSING = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "CURL"),
  *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)


def place(where: str | os.PathLike) -> epath.Path:
  """The path of a directory, absolute.

  Args:
    where: a local path or `gs://BUCKET/...`.

  Raises:
    UserError: another scheme, no bucket's name, or what reads buckets is not installed.
  """
  text = os.fspath(where)
  if "://" not in text:
    return epath.Path(user_path(text).absolute())
  if not text.startswith(SCHEME) or not text.removeprefix(SCHEME).partition("/")[0]:
    raise UserError(f"{text}: neither a local path nor {SCHEME}BUCKET/DIRECTORY")
  try:
    import fsspec  # noqa: PLC0415  # with gcsfs, of those who use buckets
    import gcsfs  # noqa: F401, PLC0415
  except ImportError as error:
    raise UserError(f"{text} needs gcsfs: pip install 'jaxpref[gcs]'") from error
  os.environ["EPATH_USE_TF"] = "false"  # the same client with and without TensorFlow
  # Orbax writes beside it, and other processes do.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(text.rstrip("/"))


def is_bucket(path: epath.Path) -> bool:
  """Whether this is of a bucket."""
  return os.fspath(path).startswith(SCHEME)


@contextlib.contextmanager
def failures_of(path: epath.Path) -> Iterator[None]:
  """Errors of a bucket's clients, which are of many kinds, as one line.

  Raises:
    TransientError: no connection, no permission, no such bucket: not told apart.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not is_bucket(path):
      raise
    raise _unreachable(path, error) from error


def raise_passing(path: epath.Path, error: Exception) -> None:
  """Tells a bucket that does not answer from data that are not as they should be.

  Raises:
    TransientError: it does not answer; nothing is raised for the other.
  """
  if not is_bucket(path) or isinstance(error, UserError):
    return
  passes = any(text in str(error) for text in _PASSING)
  if passes or not isinstance(error, ValueError | KeyError):
    raise _unreachable(path, error) from error


def _unreachable(path: epath.Path, error: Exception) -> TransientError:
  return TransientError(f"{path} cannot be reached: {first_line(error)}")


def write(path: epath.Path, text: str) -> None:
  """Writes a file, whole or not at all."""
  if is_bucket(path):
    path.write_text(text, encoding="utf-8")
  else:
    write_text(Path(path), text)


def is_whole(path: epath.Path) -> bool:
  """Whether this is a checkpoint's directory, not what a killed save has left or a file."""
  return (path / MARK).exists() if is_bucket(path) else path.is_dir()


def move(path: epath.Path, target: epath.Path) -> None:
  """Renames a directory; in a bucket each object is copied by Google, the mark first gone."""
  if not is_bucket(path):
    path.rename(target)
    return
  (path / MARK).unlink(missing_ok=True)
  for name in files(path):
    (path / name).copy(target / name, overwrite=True)
  path.rmtree()


def files(path: epath.Path) -> list[str]:
  """All files below, by their paths from here, sorted."""
  found = []
  for entry in path.iterdir():
    below = (
      [f"{entry.name}/{name}" for name in files(entry)] if entry.is_dir() else [entry.name]
    )
    found.extend(below)
  return sorted(found)


def is_file(path: epath.Path) -> bool:
  """Whether it can be read as a file; a pipe would wait for a writer."""
  return path.is_file() if is_bucket(path) else Path(path).is_file()


def clear(path: epath.Path) -> None:
  """Removes a directory with all below, or a link or file of that name, if there is one."""
  if is_bucket(path):
    if path.exists():
      path.rmtree()
  elif Path(path).is_dir() and not Path(path).is_symlink():
    path.rmtree()
  else:
    path.unlink(missing_ok=True)


def size(file: epath.Path) -> int:
  """In bytes."""
  if is_bucket(file):
    return file.stat().length
  return Path(file).stat().st_size  # epath's fails for a user whom the system does not know


def checksum(file: epath.Path) -> Any:
  """CRC-32 of a local file; of a bucket's the CRC-32C that Google has of it, in base64."""
  if is_bucket(file):
    import fsspec  # noqa: PLC0415

    return fsspec.filesystem("gcs").info(os.fspath(file))["crc32c"]
  crc = 0
  with file.open("rb") as stream:
    while chunk := stream.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return crc
