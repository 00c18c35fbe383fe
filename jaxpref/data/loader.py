"""An endless loader of batches of row indices, shuffled in every epoch.

The rows themselves stay in arrays, so a batch is a list of indices and the loader's state is
one number.
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

  Each epoch returns every row once, in a new order. A batch may start in one epoch and end in
  the next; if it is larger than the data set, it has some rows more than once. With
  `probabilities`, indices are sampled independently, with replacement, without epochs.

  Args:
    num_rows: number of rows of the data set.
    batch_size: rows of the global batch, over all devices.
    seed: seed of the order, in [0, 2**32).
    probabilities: sampling probability of each row, [num_rows]; None shuffles epochs.

  Returns:
    An iterator of int [batch_size], equal on all processes; each device then takes its rows.
    `get_state()` returns its position as a JSON value, and `set_state` moves it there.

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
  batches = order.batch(batch_size).map(np.asarray)
  # Without prefetching threads, the position is that of the last batch returned.
  at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(at_once))


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
