"""Deals the rows of a data set, shuffled anew each epoch, in batches of their indices.

The rows themselves stay in arrays; an index is all that has to be dealt, and the position
of the data is one number.
"""

import grain
import numpy as np


def make_loader(
  num_rows: int,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[np.ndarray]:
  """An endless iterator of batches of row indices.

  Epochs follow upon each other without a gap: each deals every row once, in an order of
  its own, and a batch may take its first rows from one and its last from the next. With
  fewer rows than a batch has, rows recur in it.

  Args:
    num_rows: rows of the data set.
    batch_size: of the global batch.
    seed: of the order, in [0, 2**32).
    process_index: this process, whose part of each global batch is dealt.
    process_count: processes that share a batch: together, in their order, they deal
      what one alone would.

  Returns:
    An iterator of int [batch_size / process_count]; `get_state()` gives its position as
    JSON takes it, the same on every process, and `set_state` goes there.

  Raises:
    ValueError: there are no rows, or the processes cannot share a batch equally.
  """
  if num_rows < 1:
    raise ValueError(f"there are {num_rows} rows")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(f"{process_count} processes cannot share a batch of {batch_size}")
  if not 0 <= process_index < process_count:
    raise ValueError(f"there is no process {process_index} of {process_count}")
  size = batch_size // process_count
  mine = slice(process_index * size, (process_index + 1) * size)
  batches = (
    grain.MapDataset.source(range(num_rows))
    .seed(seed)
    .shuffle()
    .repeat()  # before batching: batches go on from one epoch into the next
    .batch(batch_size)
    .map(lambda rows: np.asarray(rows)[mine])
  )
  # No threads: there is nothing to wait for, and the position is that of what was dealt.
  at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(at_once))
