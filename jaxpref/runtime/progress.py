"""Progress bars, which only process 0 of a run shows."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
  """Returns a tqdm bar on stderr, updated every 0.1 s on a terminal and every 10 s in a file.

  Args:
    iterable: what the bar iterates over; None for a bar that the caller updates.
    **options: further arguments of `tqdm.tqdm`.
  """
  options.setdefault("disable", jax.process_index() > 0)
  return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)
