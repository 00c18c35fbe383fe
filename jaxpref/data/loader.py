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
) -> grain.DatasetIterator[np.ndarray]:
  """An endless iterator of batches of row indices.

  Epochs follow upon each other without a gap: each deals every row once, in an order of
  its own, and a batch may take its first rows from one and its last from the next. With
  fewer rows than a batch has, rows recur in it.

  Args:
    num_rows: rows of the data set.
    batch_size: of the global batch.
    seed: of the order, in [0, 2**32).

  Returns:
    An iterator of int [batch_size], the same on every process, whose devices then take
    their rows; `get_state()` gives its position as JSON takes it, and `set_state` goes
    there.

  Raises:
    ValueError: there are no rows.
  """
  if num_rows < 1:
    raise ValueError(f"there are {num_rows} rows")
  if batch_size < 1:
    raise ValueError(f"there is no batch of {batch_size}")
  batches = (
    grain.MapDataset.source(range(num_rows))
    .seed(seed)
    .shuffle()
    .repeat()  # before batching: batches go on from one epoch into the next
    .batch(batch_size)
    .map(np.asarray)
  )
  # No threads: there is nothing to wait for, and the position is that of what was dealt.
  at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(at_once))
