"""Arrays that are read only where a batch needs them."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


class Gather:
  """The rows of an array by number: `x[i]` is `values[numbers[i]]`.

  Several rows may share a value, such as the encoding of a caption. An index beyond the last
  row begins again at the first, see `crops.visit`.
  """

  def __init__(self, values: Any, numbers: np.ndarray, dtype: Any = None):
    """Makes the view.

    Args:
      values: an array in memory, a `Stored`, or a `Lazy`, [V, ...].
      numbers: of the values, int [N, ...].
      dtype: of the result; by default that of the values.
    """
    self._values, self._numbers = values, numbers
    self.shape = (*numbers.shape, *values.shape[1:])
    self.dtype = np.dtype(dtype or values.dtype)

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self._numbers)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Reads all rows, for NumPy."""
    del copy
    return np.asarray(self[:], dtype)

  def __getitem__(self, index: Any) -> np.ndarray:
    """Reads the rows of an index, int [B] or a slice."""
    if not isinstance(index, slice):
      index = np.asarray(index) % len(self)
    return np.asarray(self._values[self._numbers[index]], self.dtype)


class Stored:
  """An array in a NumPy file, of which only the items that are asked for are read.

  Unlike a map into memory, it takes no memory of the process, and a file that becomes shorter
  is an error and not the end of the process.
  """

  def __init__(self, path: Path):
    """Opens the file.

    Raises:
      ValueError: it is not a NumPy file, or shorter than its array.
      OSError: it cannot be read.
    """
    self._file = path.open("rb")
    version = np.lib.format.read_magic(self._file)
    if version != (1, 0):
      raise ValueError(f"a NumPy file of version {version}")
    shape, by_columns, self.dtype = np.lib.format.read_array_header_1_0(self._file)
    if by_columns or self.dtype.hasobject or not shape:
      raise ValueError("not an array of numbers by rows")
    self.shape: tuple[int, ...] = shape
    self._start = self._file.tell()
    self._bytes = math.prod(shape[1:]) * self.dtype.itemsize
    if path.stat().st_size != self._start + shape[0] * self._bytes:
      raise ValueError(f"{path.stat().st_size} bytes do not fit its shape {shape}")

  def __len__(self) -> int:
    """Returns the number of items."""
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    """Reads the items of an index, int of any shape or a slice.

    Raises:
      OSError: the file cannot be read or has become shorter.
    """
    numbers = _numbers_of(index, len(self))
    found = np.empty((numbers.size, *self.shape[1:]), self.dtype)
    rows: Any = found.reshape(numbers.size, -1).view(np.uint8)
    for row, number in zip(rows, numbers.ravel().tolist(), strict=True):
      place = self._start + number * self._bytes
      if os.preadv(self._file.fileno(), [row], place) != self._bytes:
        raise OSError(f"{self._file.name} has become shorter")
    return found.reshape(*numbers.shape, *self.shape[1:])


class Lazy:
  """An array whose items are made when they are read."""

  def __init__(self, read: Callable[[list[int]], Any], shape: Sequence[int], dtype: Any):
    """Makes the array.

    Args:
      read: from the numbers of items to the items, see `in_threads`.
      shape: of the array, with the number of items first.
      dtype: of the items.
    """
    self._read = read
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)

  def __len__(self) -> int:
    """Returns the number of items."""
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    """Reads the items of an index, int of any shape or a slice."""
    numbers = _numbers_of(index, len(self))
    found = np.stack(self._read(numbers.ravel().tolist()))
    return found.reshape(*numbers.shape, *self.shape[1:])


def in_threads(read: Callable[[int], np.ndarray]) -> Callable[[list[int]], list[np.ndarray]]:
  """Wraps a function that reads one item into one that reads a list of items, in threads."""
  return lambda numbers: list(_threads().map(read, numbers))


def _numbers_of(index: Any, length: int) -> np.ndarray:
  return np.arange(length)[index] if isinstance(index, slice) else np.asarray(index)


_pool: list[ThreadPoolExecutor] = []


def _threads() -> ThreadPoolExecutor:
  """Returns the threads that decode images; Pillow does not hold the interpreter's lock."""
  if not _pool:
    _pool.append(ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="read"))
  return _pool[0]
