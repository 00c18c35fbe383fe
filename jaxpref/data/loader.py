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
  probabilities: np.ndarray | None = None,
) -> grain.DatasetIterator[np.ndarray]:
  """Makes an endless iterator of batches of row indices.

  Epochs follow upon each other without a gap: each deals every row once, in an order of
  its own, and a batch may take its first rows from one and its last from the next. With
  fewer rows than a batch has, rows recur in it. With `probabilities` there are no epochs:
  every index is chosen by itself, with replacement.

  Args:
    num_rows: rows of the data set.
    batch_size: of the global batch.
    seed: of the order, in [0, 2**32).
    probabilities: of each row to be the next one, [num_rows]; None deals all in turn.

  Returns:
    An iterator of int [batch_size], the same on every process, whose devices then take
    their rows; `get_state()` gives its position as JSON takes it, and `set_state` goes
    there.

  Raises:
    ValueError: there are no rows, or not as many probabilities.
  """
  if num_rows < 1:
    raise ValueError(f"there are {num_rows} rows")
  if batch_size < 1:
    raise ValueError(f"there is no batch of {batch_size}")
  rows = grain.MapDataset.source(range(num_rows)).seed(seed)
  if probabilities is None:
    # Before batching: batches go on from one epoch into the next.
    order = rows.shuffle().repeat()
  elif len(probabilities) != num_rows:
    raise ValueError(f"there are {num_rows} rows and {len(probabilities)} probabilities")
  else:
    limits = np.cumsum(probabilities)[:-1]  # the last row takes what rounding leaves
    # The generator is of the position alone, so that the position is the whole state.
    order = rows.repeat().random_map(
      lambda _, rng: int(np.searchsorted(limits, rng.random(), side="right"))
    )
  batches = order.batch(batch_size).map(np.asarray)
  # No threads: there is nothing to wait for, and the position is that of what was dealt.
  at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(at_once))


def probabilities_of(desirable: np.ndarray, share: float) -> np.ndarray:
  """Chances of rows of two kinds, the same within a kind, that make up a share.

  Args:
    desirable: whether a row is, bool [N], of both kinds.
    share: of desirable rows that is expected.

  Returns:
    float64 [N], with sum 1.
  """
  liked = int(desirable.sum())
  return np.where(desirable, share / liked, (1 - share) / (len(desirable) - liked))
