"""A reader of ArrayRecord data sets that tensorflow_datasets describes."""

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxpref.errors import UserError, first_line


class Records(Sequence[Mapping[str, Any]]):
  """The rows of a split, each a mapping from columns to values; text is bytes.

  Attributes:
    directory: of the data set.
  """

  def __init__(self, directory: str | os.PathLike, split: str, *, advice: str):
    """Opens a data set.

    Args:
      directory: the data set's version directory.
      split: name of the split.
      advice: what the user should do if files are damaged; the end of the error messages.

    Raises:
      UserError: the data set cannot be opened.
    """
    self._advice = advice
    try:
      builder = tfds.builder_from_directory(directory)
      self._source = builder.as_data_source(split)
      found = builder.info.splits[split]
      self._files = [Path(file).name for file in found.filepaths]
      self._starts = list(itertools.accumulate(found.shard_lengths, initial=0))
      self.directory, self._length = Path(directory), len(self._source)
    except Exception as error:  # damaged files raise errors of any type
      raise UserError(f"{directory} is damaged: {first_line(error)}; {advice}") from error

  def __len__(self) -> int:
    """Returns the number of rows."""
    return self._length

  def __getitem__(self, index):
    """Reads row `index`.

    Raises:
      UserError: the file of the row is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._source[index]
    except Exception as error:  # ArrayRecord's RuntimeError, or any error of the decoder
      path = self.directory / self._files[self._shard(index)]
      raise UserError(f"{path} is damaged: {first_line(error)}; {self._advice}") from error

  def where(self, index: int) -> str:
    """Names a row by its file and its number in that file, from 0."""
    shard = self._shard(index)
    return f"{self._files[shard]} row {index - self._starts[shard]}"

  def _shard(self, index: int) -> int:
    return bisect.bisect_right(self._starts, index) - 1
