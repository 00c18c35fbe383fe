"""Preference pairs in tar files, as the package `webdataset` writes them.

The members of a row share the part of their names before the first dot:
`KEY.original_prompt.txt`, `KEY.jpg_0.jpg`, `KEY.jpg_1.jpg`, `KEY.label_0.txt`,
`KEY.label_1.txt`. `data.path` is a tar file or a folder of tar files, without compression, so
that any row can be read without those before it.
"""

import bisect
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxpref.data import splits
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.sources import Table
from jaxpref.errors import UserError, first_line
from jaxpref.runtime.paths import user_path

SORTED = True
_MEMBERS = {
  "original_prompt.txt": "caption",
  "jpg_0.jpg": "jpg_0",
  "jpg_1.jpg": "jpg_1",
  "label_0.txt": "label_0",
  "label_1.txt": "label_1",
}
_COLUMNS = tuple(_MEMBERS.values())


def open_pairs(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the pairs of all tar files, in the order of the files.

  Raises:
    UserError: no tar file is found, or one is damaged.
  """
  del kind
  root = user_path(data.path)
  if data.path and root.is_file():
    return Tars([root])
  found = sorted(root.rglob("*.tar")) if data.path and root.is_dir() else []
  if not found:
    raise UserError(f"data.path {data.path!r} is not a tar file or a folder with tar files")
  names = [p.relative_to(root).as_posix() for p in found]
  chosen, said = splits.choose(names, data.split, root)
  if said:
    tally.read.append(said)
  return Tars([root / name for name in chosen])


class Tars(Sequence[Mapping[str, Any]]):
  """The rows of tar files, read by the place of their members."""

  def __init__(self, files: Sequence[Path]):
    """Reads the tables of contents.

    Raises:
      UserError: a file is not a tar file, or is damaged or compressed.
    """
    self._files = files
    # Begins and sizes of each file's members, [rows, columns, 2]; -1 where one is missing.
    self._places = [_index(file) for file in files]
    self._starts = np.cumsum([0, *(len(p) for p in self._places)]).tolist()

  def __len__(self) -> int:
    """Returns the number of rows."""
    return self._starts[-1]

  def __getitem__(self, index):
    """Reads a row.

    Raises:
      BadRow: a member is missing, or its label is not a number.
    """
    file, row = self._find(index)
    values: dict[str, Any] = {}
    with self._files[file].open("rb") as stream:
      for name, (begin, size) in zip(_COLUMNS, self._places[file][row], strict=True):
        if begin < 0:
          raise BadRow(f"no member for {name}")
        stream.seek(begin)
        values[name] = stream.read(size)
    for k in (0, 1):
      try:
        values[f"label_{k}"] = float(values[f"label_{k}"])
      except ValueError as error:
        raise BadRow(f"label_{k} is not a number") from error
    return values

  def where(self, index: int) -> str:
    """Names a row by its file and its number in that file, from 0."""
    file, row = self._find(index)
    return f"{self._files[file].name} row {row}"

  def _find(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    file = bisect.bisect_right(self._starts, index) - 1
    return file, index - self._starts[file]


def _index(file: Path) -> np.ndarray:
  rows: dict[str, list[tuple[int, int]]] = {}
  try:
    with tarfile.open(file, "r:") as tar:
      for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
        key, _, rest = Path(member.name).name.partition(".")
        if not member.isreg() or rest not in _MEMBERS:
          continue
        key = f"{Path(member.name).parent}/{key}"
        places = rows.setdefault(key, [(-1, 0)] * len(_COLUMNS))
        places[_COLUMNS.index(_MEMBERS[rest])] = (member.offset_data, member.size)
  except (tarfile.TarError, OSError, ValueError) as error:
    raise UserError(
      f"{file} cannot be read as an uncompressed tar file: {first_line(error)}"
    ) from error
  if not rows:
    raise UserError(f"{file} has no members like KEY.jpg_0.jpg")
  return np.array(list(rows.values()), np.int64)
