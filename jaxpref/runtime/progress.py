"""Progress bars, of a run of several processes only the first's."""

import sys
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
  """A bar of tqdm on stderr; a log file gets it every ten seconds, not ten times a second.

  Args:
    iterable: to go through, if any.
    **options: of `tqdm.tqdm`.
  """
  options.setdefault("disable", jax.process_index() > 0)
  return tqdm(iterable, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)
