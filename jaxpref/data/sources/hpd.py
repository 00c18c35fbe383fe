"""Human Preference Dataset v2 (Wu et al. 2023, https://arxiv.org/abs/2306.09341).

`train.json` has pairs, `test.json` ranked lists; the images lie in `train/` and `test/` beside
them. `data.path` is the folder, of which `data.split` selects the file, or one of the files.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ijson
from ml_collections import ConfigDict

from jaxpref.data.bad_rows import BadRow, Tally, number_of
from jaxpref.data.sources import Table
from jaxpref.data.sources.listing import Listing, file_in, find_listing
from jaxpref.errors import UserError, first_line

SORTED = True
_FIELDS = ("prompt", "file_path", "human_preference", "image_path", "rank")


def open_pairs(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the pairs of a file.

  Raises:
    UserError: the file does not exist, is damaged, or has no pairs.
  """
  del tally, kind
  return _open(data, "human_preference", _pair, "pairs: they are in train.json")


def open_lists(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the ranked lists of a file.

  Raises:
    UserError: the file does not exist, is damaged, or has no ranked lists.
  """
  del tally, kind
  where = "ranked lists: they are in test.json (data.split=test)"
  return _open(data, "rank", _list, where)


def open_captions(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the prompts of a file of either kind."""
  del tally, kind
  file, entries = _read(data)
  return Listing(entries, lambda entry: {"caption": entry.get("prompt")}, file.name)


def _open(data: ConfigDict, field: str, row_of: Callable[..., Any], lacking: str) -> Listing:
  """Opens a file whose entries have a field; `row_of(file, entry)` makes a row of one."""
  file, entries = _read(data)
  if field not in entries[0]:
    raise UserError(f"{file} has no {lacking}")
  return Listing(entries, functools.partial(row_of, file), file.name)


def _read(data: ConfigDict) -> tuple[Path, list[dict[str, Any]]]:
  file = find_listing(data.path, f"{data.split}.json", "a JSON file of HPDv2")
  try:
    with file.open("rb") as stream:
      items = ijson.items(stream, "item", use_float=True)
      entries = [
        {name: item[name] for name in _FIELDS if name in item} if isinstance(item, dict) else {}
        for item in items
      ]
  except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
    raise UserError(f"{file} cannot be read as JSON: {first_line(error)}") from error
  if not entries:
    raise UserError(f"{file} is not a JSON list of rows")
  return file, entries


def _pair(file: Path, entry: dict[str, Any]) -> dict[str, Any]:
  names, labels = _values(entry, "file_path"), _values(entry, "human_preference")
  if len(names) != 2 or len(labels) != 2:  # noqa: PLR2004
    raise BadRow("a pair without two images and two labels")
  row = {"caption": entry.get("prompt")}
  for k in (0, 1):
    row[f"jpg_{k}"] = file_in(file.parent / file.stem, names[k], "file_path")
    row[f"label_{k}"] = labels[k]
  return row


def _list(file: Path, entry: dict[str, Any]) -> dict[str, Any]:
  names, ranks = _values(entry, "image_path"), _values(entry, "rank")
  if len(names) != len(ranks) or not names:
    raise BadRow("a list without a rank for each image")
  row = {"prompt": entry.get("prompt")}
  for k, (name, rank) in enumerate(zip(names, ranks, strict=True)):
    row[f"jpg_{k}"] = file_in(file.parent / file.stem, name, "image_path")
    row[f"rank_{k}"] = number_of(rank, "rank")
  return row


def _values(entry: dict[str, Any], name: str) -> list[Any]:
  value = entry.get(name)
  if not isinstance(value, list):
    raise BadRow(f"{name} is not a list")
  return value
