"""Copies of remote files, through fsspec: `gs://`, `s3://`, `hf://` and all that it knows."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from jaxpref.errors import UserError, first_line, storage_error
from jaxpref.runtime import progress


def is_remote(path: str | os.PathLike) -> bool:
  """Tells whether a path has a scheme, such as `gs://`."""
  return "://" in os.fspath(path)


def fetch(url: str, target: Path) -> Path:
  """Copies a remote file, or all files of a remote folder, that are not there yet.

  Each file is copied to a temporary name first, so that an interrupted copy resumes with the
  files that are missing.

  Args:
    url: of the file or folder.
    target: a local directory.

  Returns:
    The copy's path: a file, or the directory.

  Raises:
    UserError: the files cannot be read, there are none, or the disk is full.
  """
  try:
    system, root = fsspec.core.url_to_fs(url)
    is_file = system.isfile(root)
    found: Mapping[str, Any] = (
      {root: system.info(root)} if is_file else system.find(root, detail=True)
    )
  except ImportError as error:
    raise UserError(f"{url} needs a package: {first_line(error)}") from error
  except Exception as error:  # each file system raises its own
    raise UserError(f"cannot read {url}: {first_line(error)}") from error
  if not found:
    raise UserError(f"{url} has no files")
  parent = str(PurePosixPath(root).parent) if is_file else root
  files = {_inside(name, parent, url): info["size"] or 0 for name, info in found.items()}
  with progress.progress_bar(
    total=sum(files.values()), unit="B", unit_scale=True, desc="download"
  ) as bar:
    for (name, size), source in zip(files.items(), found, strict=True):
      path = target / name
      if not (path.is_file() and path.stat().st_size == size):
        _copy(system, source, path, url)
      bar.update(size)
  return target / next(iter(files)) if is_file else target


def _inside(name: str, parent: str, url: str) -> Path:
  relative = Path(os.path.relpath(name, parent))
  if relative.is_absolute() or ".." in relative.parts:
    raise UserError(f"{url}: the name {name!r} leads out of the folder")
  return relative


def _copy(system: Any, source: str, path: Path, url: str) -> None:
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    system.get_file(source, str(temporary))
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise storage_error(f"cannot copy {source} of {url}: {first_line(error)}", error) from error
  except Exception as error:  # each file system raises its own
    temporary.unlink(missing_ok=True)
    raise UserError(f"cannot copy {source} of {url}: {first_line(error)}") from error
