"""Tables of image files that a listing names: what HPDv2, MJHQ-30k and the KTO csv share."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import UserError
from jaxpref.runtime.paths import user_path


class Listing(Sequence[Mapping[str, Any]]):
  """The rows of a listing; `read` makes a row from an entry when it is asked for."""

  def __init__(
    self, entries: Sequence[Any], read: Callable[[Any], Mapping[str, Any]], name: str
  ):
    """Makes a table.

    Args:
      entries: of the listing.
      read: makes a row from an entry; raises `BadRow` if it cannot.
      name: of the listing, for messages.
    """
    self._entries, self._read, self._name = entries, read, name

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._entries)

  def __getitem__(self, index):
    """Returns row `index`.

    Raises:
      BadRow: its entry cannot be used.
    """
    return self._read(self._entries[index])

  def where(self, index: int) -> str:
    """Names a row by its listing and its number there, from 0."""
    return f"{self._name} row {index}"


def file_in(root: Path, name: Any, column: str) -> Path:
  """Returns the path of an image that a listing names.

  Args:
    root: the folder that the name is relative to.
    name: the entry's value.
    column: its column, for the reason.

  Raises:
    BadRow: it is not a name, or leads out of the folder.
  """
  if not isinstance(name, str) or not name.strip():
    raise BadRow(f"{column} is not a file's name")
  try:
    path = Path(os.path.normpath(root / name))
    if path.is_relative_to(root) and path.resolve().is_relative_to(root.resolve()):
      return path
  except (OSError, ValueError, RuntimeError):
    pass
  raise BadRow(f"{column} leads out of the folder")


def find_listing(path: str, name: str, what: str) -> Path:
  """Returns the path of a listing: `path` itself, or the file `name` in it.

  Raises:
    UserError: neither is a file.
  """
  given = user_path(path)
  file = given / name if given.is_dir() else given
  if not path or not file.is_file():
    raise UserError(f"data.path {path!r} is not {what} or a folder with {name}")
  return file
