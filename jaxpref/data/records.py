"""Rows of ArrayRecord data sets that tensorflow_datasets describes."""

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxpref.errors import UserError, first_line


class Records(Sequence[Mapping[str, Any]]):
  """The rows of a split, columns to values, text as bytes; damage is one line."""

  def __init__(self, directory: str | os.PathLike, split: str, *, advice: str):
    """Opens a data set.

    Args:
      directory: of the data set.
      split: of it.
      advice: what to do where it is damaged, for messages.

    Raises:
      UserError: it cannot be opened.
    """
    self._advice = advice
    try:
      builder = tfds.builder_from_directory(directory)
      self._source = builder.as_data_source(split)
      found = builder.info.splits[split]
      self._files = [Path(file).name for file in found.filepaths]
      self._starts = list(itertools.accumulate(found.shard_lengths, initial=0))
      self._directory, self._length = Path(directory), len(self._source)
    except Exception as error:  # of damaged files it may raise anything
      raise UserError(f"{directory} is damaged: {first_line(error)}; {advice}") from error

  def __len__(self) -> int:
    """All rows."""
    return self._length

  def __getitem__(self, index):
    """A row.

    Raises:
      UserError: its file is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._source[index]
    except Exception as error:  # a RuntimeError of ArrayRecord's, or what the bytes bring about
      path = self._directory / self._files[self._shard(index)]
      raise UserError(f"{path} is damaged: {first_line(error)}; {self._advice}") from error

  def where(self, index: int) -> str:
    """File and number of a row, from 0 on."""
    shard = self._shard(index)
    return f"{self._files[shard]} row {index - self._starts[shard]}"

  def _shard(self, index: int) -> int:
    return bisect.bisect_right(self._starts, index) - 1
