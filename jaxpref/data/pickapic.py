"""Pick-a-Pic (Kirstain et al. 2023), and what has its columns, from local parquet files.

Only the columns that are used are read, a row group at a time, so that a data set larger
than memory can be opened. Experts are chosen by the columns `score_0` and `score_1`, which
Pick-a-Pic itself does not have: they are for the user to add, by a scorer of their choice.
"""

import bisect
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxpref.errors import UserError

_NEEDED = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_USED = (*_NEEDED, "image_0_uid", "image_1_uid", "score_0", "score_1")


class PickAPic(Sequence[Mapping[str, Any]]):
  """Rows of parquet files in order of their names."""

  def __init__(self, files: Sequence[Path]):
    self._groups = []  # (file, row group)
    self._starts = [0]
    for file in files:
      try:
        described = pq.ParquetFile(file)
      except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from error
      if lacking := [c for c in _NEEDED if c not in described.schema_arrow.names]:
        raise UserError(f"{file} lacks {', '.join(lacking)}, columns of Pick-a-Pic")
      for group in range(described.num_row_groups):
        self._groups.append((file, group))
        self._starts.append(self._starts[-1] + described.metadata.row_group(group).num_rows)

  def __len__(self) -> int:
    """All rows, ties included."""
    return self._starts[-1]

  def __getitem__(self, index):
    """The used columns of a row."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    group = bisect.bisect_right(self._starts, index) - 1
    return _read(*self._groups[group])[index - self._starts[group]]


@functools.lru_cache(maxsize=2)
def _read(file: Path, group: int) -> list[dict[str, Any]]:
  parquet = pq.ParquetFile(file)
  columns = [c for c in _USED if c in parquet.schema_arrow.names]
  try:
    return parquet.read_row_group(group, columns=columns).to_pylist()
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"{file} is damaged: {error}") from error


def open_pickapic(path: str) -> PickAPic:
  """The rows of a parquet file, or of all in a folder.

  Raises:
    UserError: there is none, or one is no parquet file with Pick-a-Pic's columns.
  """
  root = Path(path).expanduser()
  files = [root] if root.is_file() else sorted(root.glob("*.parquet")) if path else []
  if not files:
    raise UserError(f"data.path {os.fspath(path)!r} is no parquet file, nor a folder of some")
  return PickAPic(files)
