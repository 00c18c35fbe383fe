"""The embedded shapes world, generated on first use."""

from ml_collections import ConfigDict

from jaxpref.data.bad_rows import Tally
from jaxpref.data.sources import Table
from jaxpref.errors import UserError


def open_pairs(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the pairs of train prompts."""
  del tally, kind
  from jaxpref.shapes import builder  # noqa: PLC0415  # TFDS takes a second

  _check_path(data)
  return builder.load_preferences("train")


def open_lists(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the ranked lists of `data.list_size` images of train prompts."""
  del tally, kind
  from jaxpref.shapes import rankings  # noqa: PLC0415

  _check_path(data)
  return rankings.load_rankings("train", data.list_size)


def _check_path(data: ConfigDict) -> None:
  if data.path:
    raise UserError(
      f"data.path = {data.path!r} is not a built data set; name what its files are with "
      "data.source (folder, pickapic, ...), or build it: python -m jaxpref.data build"
    )
