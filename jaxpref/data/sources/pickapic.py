"""A reader of local parquet files with the columns of Pick-a-Pic (Kirstain et al. 2023).

It reads one row group at a time and only the columns that are used, so that a data set larger
than memory can be opened. Experts are chosen by the columns `score_0` and `score_1`. Pick-a-Pic
itself does not have them: the user adds them with a scorer of their choice.
"""

import bisect
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref.data import parquet, splits
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.errors import UserError
from jaxpref.runtime.paths import user_path

SORTED = True
_KINDS = {
  "caption": "text",
  **dict.fromkeys(("jpg_0", "jpg_1"), "image"),
  **dict.fromkeys(("label_0", "label_1", "score_0", "score_1"), "number"),
  **dict.fromkeys(("image_0_uid", "image_1_uid"), "name"),
}
_IMAGES, _LABELS = ("caption", "jpg_0", "jpg_1"), ("label_0", "label_1")
_NO_PAIRS = (
  "; single images with captions are read from a folder of image files (data.source=folder)"
)
_SCORES = ("score_0", "score_1", "image_0_uid", "image_1_uid")
# Required and optional columns of each kind of rows.
_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "captions": (("caption",), ()),
  "experts": (_IMAGES, _SCORES),
  "pairs": ((*_IMAGES, *_LABELS), ()),
  "all": ((*_IMAGES, *_LABELS), _SCORES),
}


class PickAPic(Sequence[Mapping[str, Any]]):
  """The rows of parquet files, in the order of the files."""

  def __init__(self, files: Sequence[Path], kind: str = "all"):
    """Opens the files.

    Args:
      files: the parquet files of the data set.
      kind: the kind of rows to read, which selects the columns: 'captions', 'experts', 'pairs'
        or 'all'.

    Raises:
      UserError: a file is not parquet, a column is missing or has another type.
    """
    needed, more = _COLUMNS[kind]
    kinds = {name: _KINDS[name] for name in (*needed, *more)}
    self._groups: list[tuple[Path, int, int]] = []  # file, row group, its first row's number
    self._starts = [0]
    for file in files:
      opened = parquet.open_file(file, kinds)
      there = opened.schema_arrow.names
      if lacking := [c for c in needed if c not in there]:
        hint = "" if "jpg_0" in there else _NO_PAIRS
        raise UserError(f"{file} lacks the Pick-a-Pic columns {', '.join(lacking)}{hint}")
      columns = [c for c in kinds if c in there]
      if file == files[0]:
        self._columns = columns
      if self._columns != columns:
        one, other = (file, files[0]) if len(columns) < len(self._columns) else (files[0], file)
        differ = sorted({*columns} ^ {*self._columns})
        raise UserError(f"{one} lacks {', '.join(differ)}, which {other} has")
      first = 0
      for group in range(opened.num_row_groups):
        self._groups.append((file, group, first))
        first += opened.metadata.row_group(group).num_rows
        self._starts.append(self._starts[-1] + opened.metadata.row_group(group).num_rows)
    self._kinds = kinds
    self._read = functools.lru_cache(maxsize=2)(self._read_group)

  def __len__(self) -> int:
    """Returns the number of rows, including ties."""
    return self._starts[-1]

  def __getitem__(self, index):
    """Reads a row: text as bytes, an image as bytes or as the path of its file.

    Raises:
      BadRow: the image's path leads out of the parquet file's folder.
      UserError: the file is damaged.
    """
    group, row = self._find(index)
    file, columns = self._groups[group][0], self._read(group)
    values = {name: column[row] for name, column in columns.items()}
    for name, value in values.items():
      if isinstance(value, tuple):
        values[name] = _content(value, file.parent, name)
    return values

  def where(self, index: int) -> str:
    """Names a row by its file and its number in that file, from 0."""
    group, row = self._find(index)
    file, _, first = self._groups[group]
    return f"{file.name} row {first + row}"

  def _find(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    group = bisect.bisect_right(self._starts, index) - 1
    return group, index - self._starts[group]

  def _read_group(self, group: int) -> dict[str, list[Any]]:
    file, number, _ = self._groups[group]
    opened = parquet.open_file(file, self._kinds)
    return parquet.read_group(opened, file, number, self._columns)


def _content(value: tuple[bytes | None, bytes | None], beside: Path, column: str) -> Any:
  """Returns the bytes of a struct, or the path of a file beside the parquet file."""
  content, path = value
  if content is not None or not path:
    return content
  found = beside / os.fsdecode(path)
  try:
    if found.resolve().is_relative_to(beside.resolve()):
      return found
  except (OSError, ValueError, RuntimeError):
    pass
  raise BadRow(f"{column} is a path that leads out of the folder")


def open_pairs(data: ConfigDict, tally: Tally, kind: str = "pairs") -> "PickAPic":
  """Opens the parquet files in `data.path`; see `open_pickapic`."""
  columns = {"singles": "pairs"}.get(kind, kind)
  return open_pickapic(data.path, columns, split=data.split, tally=tally)


def open_pickapic(
  path: str, kind: str = "all", *, split: str = "train", tally: Tally | None = None
) -> PickAPic:
  """Opens a parquet file, or all parquet files in a folder at any depth.

  Args:
    path: path of the file or folder.
    kind: the kind of rows to read, see `PickAPic`.
    split: the split to read if the files are named by split; see `splits.choose`.
    tally: gets a note on the files that are read.

  Raises:
    UserError: no parquet file is found, or one lacks Pick-a-Pic's columns.
  """
  root = user_path(path)
  if path and root.is_file():
    return PickAPic([root], kind)
  found = []
  if path and root.is_dir():
    inside = ((p.relative_to(root), p) for p in root.rglob("*.parquet"))
    found = sorted(
      (name for name, p in inside if p.is_file() and not _hidden(name)),
      key=lambda name: name.as_posix(),
    )
  if not found:
    raise UserError(
      f"data.path {os.fspath(path)!r} is not a parquet file or a folder with parquet files"
    )
  chosen, said = splits.choose([name.as_posix() for name in found], split, root)
  if tally and said:
    tally.read.append(said)
  return PickAPic([root / name for name in chosen], kind)


def _hidden(name: Path) -> bool:
  return any(part.startswith(".") for part in name.parts)
