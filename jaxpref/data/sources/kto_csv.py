"""Diffusion-KTO's csv of labelled images (Li et al. 2024, https://arxiv.org/abs/2404.04465).

Columns are `file_name`, `caption` and `split`: 'exclusive_win' for images that won all of their
pairs, 'exclusive_lose' for those that lost all, 'intersections' for the others. Images that
ever won are liked, as in the authors' example (`gt_label_wi_l`). `data.path` is the folder with
`<data.split>_processed_v3.csv`, or a csv file.
"""

import functools
from pathlib import Path
from typing import Any

import pandas as pd
from ml_collections import ConfigDict

from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.sources import Table
from jaxpref.data.sources.listing import Listing, file_in, find_listing
from jaxpref.errors import UserError, first_line

SORTED = True
_COLUMNS = ("file_name", "caption", "split")
_LIKED = {"exclusive_win": True, "intersections": True, "exclusive_lose": False}


def open_singles(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the labelled images, in the order of the file.

  Raises:
    UserError: the file does not exist, is damaged, or lacks a column.
  """
  del tally, kind
  file = find_listing(data.path, f"{data.split}_processed_v3.csv", "a csv file")
  try:
    rows = pd.read_csv(
      file,
      dtype=str,
      keep_default_na=False,
      encoding="utf-8",
      encoding_errors="surrogateescape",
    )
  except (ValueError, pd.errors.ParserError) as error:
    raise UserError(f"{file} cannot be read as CSV: {first_line(error)}") from error
  if lacking := [name for name in _COLUMNS if name not in rows.columns]:
    raise UserError(f"{file} lacks the columns {', '.join(lacking)}")
  entries = list(zip(*(rows[name].tolist() for name in _COLUMNS), strict=True))
  return Listing(entries, functools.partial(_single, file.parent), file.name)


def _single(root: Path, entry: tuple[str, str, str]) -> dict[str, Any]:
  name, caption, split = entry
  if split not in _LIKED:
    raise BadRow(f"split is not one of {', '.join(_LIKED)}")
  return {
    "caption": caption,
    "jpg": file_in(root, name, "file_name"),
    "liked": _LIKED[split],
  }
