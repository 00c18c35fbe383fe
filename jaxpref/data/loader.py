"""An endless loader of batches of rows, shuffled in every epoch, read ahead by a thread.

The order is a function of the seed and the position, so that the loader's whole state is one
number and its memory does not grow with the data.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np


def make_loader(
  num_rows: int,
  *,
  batch_size: int,
  seed: int,
  probabilities: np.ndarray | None = None,
  read: Callable[[int, np.ndarray], Any] = lambda _, index: index,
  ahead: int = 0,
) -> grain.DatasetIterator[Any]:
  """Makes an endless iterator of batches of rows.

  Each epoch returns every row once, in a new order. A batch may start in one epoch and end in
  the next; if it is larger than the data set, it has some rows more than once. With
  `probabilities`, indices are sampled independently, with replacement, without epochs.

  Args:
    num_rows: number of rows of the data set.
    batch_size: rows of the global batch, over all devices.
    seed: seed of the order, in [0, 2**32).
    probabilities: sampling probability of each row, [num_rows]; None shuffles epochs.
    read: from the number of a batch, from 0, and its row indices, int [batch_size], to what
      the iterator returns. The indices are equal on all processes; each then reads the rows of
      its own devices.
    ahead: number of batches that a thread reads ahead; 0 reads each when it is asked for.

  Returns:
    An iterator of the results of `read`. `get_state()` returns the position of the last batch
    that was returned as a JSON value, and `set_state` moves it there.

  Raises:
    ValueError: `num_rows` or `batch_size` is below 1, or the number of probabilities differs
      from `num_rows`.
  """
  if num_rows < 1:
    raise ValueError(f"num_rows must be at least 1 (got {num_rows})")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
  rows = grain.MapDataset.source(range(num_rows)).seed(seed)
  if probabilities is None:
    # Repeats before batching, so that a batch can span two epochs.
    order = rows.shuffle().repeat()
  elif len(probabilities) != num_rows:
    raise ValueError(f"got {len(probabilities)} probabilities for {num_rows} rows")
  else:
    limits = np.cumsum(probabilities)[:-1]  # rounding errors go to the last row
    # Each random number depends only on its position, so the position is the whole state.
    order = rows.repeat().random_map(
      lambda _, rng: int(np.searchsorted(limits, rng.random(), side="right"))
    )
  return _iterate(order.batch(batch_size).map(np.asarray), read, ahead)


def _iterate(
  batches: grain.MapDataset, read: Callable[[int, np.ndarray], Any], ahead: int
) -> grain.DatasetIterator[Any]:
  # One thread: what `read` does takes several.
  options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
  return iter(batches.map_with_index(read).to_iter_dataset(options))


def make_bucket_loader(
  sizes: Sequence[int],
  *,
  batch_size: int,
  seed: int,
  read: Callable[[int, np.ndarray], Any] = lambda _, index: index,
  ahead: int = 0,
) -> grain.DatasetIterator[Any]:
  """Makes an endless iterator of batches, each with rows of one bucket.

  Each epoch has as many batches of a bucket as it has whole batches of rows, in a random
  order; rows that are left over are others in each epoch.

  Args:
    sizes: number of rows of each bucket, whose rows follow those of the bucket before.
    batch_size: rows of the global batch.
    seed: seed of the order, in [0, 2**32).
    read: see `make_loader`.
    ahead: see `make_loader`.

  Raises:
    ValueError: no bucket has a whole batch of rows.
  """
  order = grain.MapDataset.source(_BucketOrder(tuple(sizes), batch_size, seed))
  return _iterate(order, read, ahead)


class _BucketOrder:
  """The row indices of batch `i` of one bucket, as a function of the seed and `i`."""

  def __init__(self, sizes: tuple[int, ...], batch_size: int, seed: int):
    self._batch_size, self._seed = batch_size, seed
    self._batches = [size // batch_size for size in sizes]
    if not any(self._batches):
      raise ValueError(f"no bucket has {batch_size} rows")
    starts = np.cumsum([0, *sizes])
    self._rows = [
      # Seeds of grain are 32 bits.
      grain.MapDataset.source(range(start, start + size))
      .seed((seed + 7919 * k) % 2**32)
      .shuffle()
      .repeat()
      for k, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    self._sizes = sizes

  def __len__(self) -> int:
    return sum(self._batches) << 32

  def __getitem__(self, i):
    epoch, place = divmod(int(i), sum(self._batches))
    order = _buckets_of_epoch(tuple(self._batches), self._seed, epoch)
    bucket = order[place]
    turn = int((order[:place] == bucket).sum())
    start = epoch * self._sizes[bucket] + turn * self._batch_size
    rows = self._rows[bucket]
    return np.array([rows[start + k] for k in range(self._batch_size)])


@functools.lru_cache(maxsize=4)
def _buckets_of_epoch(batches: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
  """Returns the bucket of each batch of an epoch."""
  order = np.repeat(np.arange(len(batches)), batches)
  return np.random.default_rng([seed, epoch, 0x4255434B]).permutation(order)


def probabilities_of(desirable: np.ndarray, share: float) -> np.ndarray:
  """Returns sampling probabilities that give an expected share of desirable rows.

  Args:
    desirable: bool [N]; both values must occur.
    share: expected share of desirable rows, between 0 and 1.

  Returns:
    float64 [N] with sum 1, equal for rows with equal `desirable`.
  """
  liked = int(desirable.sum())
  return np.where(desirable, share / liked, (1 - share) / (len(desirable) - liked))
