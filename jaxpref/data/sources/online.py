"""Pairs that an iterative run has generated."""

from ml_collections import ConfigDict

from jaxpref.data.bad_rows import Tally
from jaxpref.data.sources import Table


def open_pairs(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the pairs in `data.path`, a run's folder such as pairs/1."""
  del tally, kind
  from jaxpref.data import generated_pairs  # noqa: PLC0415  # TFDS takes a second

  return generated_pairs.open_pairs(data.path)
