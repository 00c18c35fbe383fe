"""PNG files under other names, as programs that judge images look for them."""

import os
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path

from jaxpref.errors import UserError, listed, storage_error

_PNG = b"\x89PNG\r\n\x1a\n"


def check_only(folder: Path, names: Collection[str]) -> None:
  """Refuses a folder with other visible files than these, which would be judged, too.

  Raises:
    UserError: the folder has others.
  """
  there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
  if others := sorted(name for name in there - {*names} if not name.startswith(".")):
    raise UserError(f"{folder} has other files ({listed(others)}): choose another directory")


def link(file: Path, target: Path) -> None:
  """Makes a hard link to a PNG file, or a copy, atomically.

  Raises:
    UserError: the file is missing or not PNG, or the link cannot be made.
  """
  temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    with file.open("rb") as stream:
      if stream.read(len(_PNG)) != _PNG:
        raise UserError(f"{file} is not a PNG file")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
      os.link(file, temporary)
    except OSError:  # another file system, or one without links
      shutil.copyfile(file, temporary)
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # it stays if the target is the same file
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise storage_error(f"cannot write {target}: {error}", error) from error
