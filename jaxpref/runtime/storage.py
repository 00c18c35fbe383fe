"""File operations on local directories and on Google Cloud Storage buckets (`gs://...`).

A bucket has no atomic rename of a directory, so Orbax marks a complete checkpoint there with
a file (`MARK`). Google stores a checksum of each object; `checksum` queries it instead of
reading the object.
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
MARK = "commit_success.txt"  # Orbax adds this file to a complete checkpoint in a bucket
# TensorStore raises these transient errors as ValueError.
_PASSING = (
  *("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "CURL"),
  *("PERMISSION_DENIED", "UNAUTHENTICATED"),
)


def place(where: str | os.PathLike) -> epath.Path:
  """Returns the absolute path of a directory.

  Args:
    where: a local path or `gs://BUCKET/...`.

  Raises:
    UserError: the scheme is not `gs://`, the bucket's name is missing, or gcsfs is not
      installed.
  """
  text = os.fspath(where)
  if "://" not in text:
    return epath.Path(user_path(text).absolute())
  if not text.startswith(SCHEME) or not text.removeprefix(SCHEME).partition("/")[0]:
    raise UserError(f"{text} is neither a local path nor {SCHEME}BUCKET/DIRECTORY")
  try:
    import fsspec  # noqa: PLC0415  # comes with gcsfs, which is optional
    import gcsfs  # noqa: F401, PLC0415
  except ImportError as error:
    raise UserError(f"{text} needs gcsfs: pip install 'jaxpref[gcs]'") from error
  os.environ["EPATH_USE_TF"] = "false"  # epath would use TensorFlow's client if installed
  # Orbax and other processes write to the bucket, too, so cached listings would be stale.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  return epath.Path(text.rstrip("/"))


def is_bucket(path: epath.Path) -> bool:
  """Tells whether a path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


@contextlib.contextmanager
def failures_of(path: epath.Path) -> Iterator[None]:
  """Turns any error in the block into a `TransientError` if the path is in a bucket.

  The clients of buckets raise errors of many types, and do not distinguish a lost connection
  from a missing permission or bucket.
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
  """Raises a `TransientError` if a bucket does not answer; returns if the data are wrong.

  Args:
    path: the path that was read.
    error: the exception that reading it raised.
  """
  if not is_bucket(path) or isinstance(error, UserError):
    return
  passes = any(text in str(error) for text in _PASSING)
  if passes or not isinstance(error, ValueError | KeyError):
    raise _unreachable(path, error) from error


def _unreachable(path: epath.Path, error: Exception) -> TransientError:
  return TransientError(f"{path} cannot be reached: {first_line(error)}")


def write(path: epath.Path, text: str) -> None:
  """Writes a text file atomically."""
  if is_bucket(path):
    path.write_text(text, encoding="utf-8")
  else:
    write_text(Path(path), text)


def is_whole(path: epath.Path) -> bool:
  """Tells whether a path is a complete checkpoint: not a file, not left by a killed save."""
  return (path / MARK).exists() if is_bucket(path) else path.is_dir()


def move(path: epath.Path, target: epath.Path) -> None:
  """Renames a directory; in a bucket, copies its objects and removes the originals."""
  if not is_bucket(path):
    path.rename(target)
    return
  # The mark goes first, so that an interrupted move leaves no complete checkpoint.
  (path / MARK).unlink(missing_ok=True)
  for name in files(path):
    (path / name).copy(target / name, overwrite=True)
  path.rmtree()


def files(path: epath.Path) -> list[str]:
  """Lists the relative paths of all files below a directory, sorted."""
  found = []
  for entry in path.iterdir():
    below = (
      [f"{entry.name}/{name}" for name in files(entry)] if entry.is_dir() else [entry.name]
    )
    found.extend(below)
  return sorted(found)


def is_file(path: epath.Path) -> bool:
  """Tells whether a path is a regular file; opening a pipe would wait for a writer."""
  return path.is_file() if is_bucket(path) else Path(path).is_file()


def clear(path: epath.Path) -> None:
  """Removes a directory with its contents, a file or a link, if the path exists."""
  if is_bucket(path):
    if path.exists():
      path.rmtree()
  elif Path(path).is_dir() and not Path(path).is_symlink():
    path.rmtree()
  else:
    path.unlink(missing_ok=True)


def size(file: epath.Path) -> int:
  """Returns the size of a file in bytes."""
  if is_bucket(file):
    return file.stat().length
  return Path(file).stat().st_size  # epath's `stat` fails if the user id has no name


def checksum(file: epath.Path) -> Any:
  """Returns a local file's CRC-32 (int), or a bucket object's stored CRC-32C (base64)."""
  if is_bucket(file):
    import fsspec  # noqa: PLC0415

    return fsspec.filesystem("gcs").info(os.fspath(file))["crc32c"]
  crc = 0
  with file.open("rb") as stream:
    while chunk := stream.read(1 << 22):
      crc = zlib.crc32(chunk, crc)
  return crc
