"""Data sources: where rows come from, one module each.

A source is a module with one or more of the functions

  open_pairs, open_images, open_singles, open_lists, open_captions

each called as `open_...(data, tally, kind)`. `data` is the configuration's section `data`,
`tally` counts what cannot be used, and `kind` is the kind of rows that the caller derives, see
`TABLES`. They return a table: a sequence (`len` and `[i]`) of mappings with these columns:

  pairs: caption, jpg_0, jpg_1, label_0, label_1; the preferred image has the larger label.
    Optional: score_0, score_1, by which experts are chosen, image_0_uid, image_1_uid.
  images: caption, jpg
  singles: caption, jpg, liked
  lists: prompt, jpg_0, jpg_1, ..., rank_0, rank_1, ...; the best image has the lowest rank.
  captions: caption

Images are encoded files: bytes, or a `Path`. A row that cannot be read raises `BadRow`. A table
may have a function `where(i)`, which names row i in messages, and `lost`, the number of rows
that it leaves out.

A source whose tables depend on its files has a function `tables_in(data)`, which returns their
names. A source with `SORTED = True` may have rows in an order with a meaning. A subset of them
is then sampled at random; otherwise it is the first ones. Only such sources take `data.split`.

`data.source` is a name in `OWN`, the name of an entry point in the group
`jaxpref.data.sources` (how another package registers its sources), or an importable module.
"""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxpref import plugins
from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import UserError
from jaxpref.runtime.paths import user_path

GROUP = "jaxpref.data.sources"
Table = Sequence[Mapping[str, Any]]
# The modules of this package by the names that users give.
OWN = {
  "shapes": "shapes_world",
  "pickapic": "pickapic",
  "folder": "folder",
  "hpd": "hpd",
  "mjhq": "mjhq",
  "kto": "kto_csv",
  "webdataset": "webdataset",
  "prompts": "prompt_list",
  "online": "online",
  "built": "built",
}
COMPLETE = "complete.json"  # written last into a built data set
# The kinds of rows that are derived from each table.
TABLES = {
  "pairs": ("pairs", "singles", "experts", "captions"),
  "images": ("experts", "captions"),
  "singles": ("singles", "experts", "captions"),
  "lists": ("lists", "captions"),
  "captions": ("captions",),
}


def is_built(path: str | os.PathLike) -> bool:
  """Tells whether a path is a finished data set of `python -m jaxpref.data build`."""
  try:
    # Generated pairs have a file of the same name, but no index.
    names = (COMPLETE, "rows.arrow")
    return bool(path) and all((user_path(path) / name).is_file() for name in names)
  except (OSError, UserError):
    return False


def name_of(data: ConfigDict) -> str:
  """Returns `data.source`, or 'built' if only `data.path` names a built data set."""
  return "built" if data.source == "shapes" and is_built(data.path) else data.source


def find_source(name: str) -> ModuleType:
  """Imports a source's module.

  Raises:
    UserError: no source has this name, or its module opens no table.
  """
  found = plugins.find_module(GROUP, OWN.get(name, name))
  if found is None:
    known = sorted({*OWN, *plugins.registered_names(GROUP)})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(
      f"data.source {name!r} is unknown{hint} (sources: {', '.join(known)}, or the name of an "
      "importable module)"
    )
  if not tables_of(found):
    functions = ", ".join(f"open_{table}" for table in TABLES)
    raise UserError(f"data.source {name!r} is not a source: it has none of {functions}")
  takes = dict.fromkeys([f"open_{table}" for table in TABLES], ("data", "tally", "kind"))
  for part, arguments in {**takes, "tables_in": ("data",)}.items():
    if (function := getattr(found, part, None)) is not None:
      plugins.check_function(f"data.source {name!r}: {part}", function, arguments)
  return found


def tables_of(source: ModuleType, data: ConfigDict | None = None) -> tuple[str, ...]:
  """Returns the tables that a source can open, with `data` those that its files have.

  Raises:
    UserError: its function `tables_in` returns something else.
  """
  if data is not None and hasattr(source, "tables_in"):
    what = f"tables_in of {source.__name__}"
    with plugins.one_line_errors(what, source.tables_in):
      tables = source.tables_in(data)
    if not (isinstance(tables, tuple) and set(tables) <= set(TABLES)):
      raise UserError(f"{what} must return a tuple of {', '.join(TABLES)} (got {tables!r})")
    return tables
  return tuple(table for table in TABLES if hasattr(source, f"open_{table}"))


def table_for(source: ModuleType, kind: str, data: ConfigDict | None = None) -> str | None:
  """Returns the table from which a source's rows of a kind are derived, or None."""
  tables = tables_of(source, data)
  if kind in tables:
    return kind
  # Images with captions are experts as they are; those of pairs have to be chosen.
  order = sorted(tables, key=lambda table: table != "images")
  return next((table for table in order if kind in TABLES[table]), None)


def open_table(name: str, table: str, data: ConfigDict, tally: Any, kind: str) -> Table:
  """Opens a table of a source.

  Args:
    name: of the source.
    table: one of `TABLES`, which the source must have.
    data: the configuration's section `data`.
    tally: counts what cannot be used.
    kind: the kind of rows that the caller derives.

  Raises:
    UserError: what the source returns is not a sequence, or a source of another package raises
      an exception.
  """
  function = getattr(find_source(name), f"open_{table}")
  what = f"data.source {name!r}: open_{table}"
  with plugins.one_line_errors(what, function):
    opened = function(data, tally, kind)
  if not (hasattr(opened, "__len__") and hasattr(opened, "__getitem__")):
    raise UserError(
      f"{what} must return a sequence of rows, with len() and [i] (got {type(opened).__name__})"
    )
  if name not in OWN and len(opened):
    _check_row(what, function, opened)
  return opened


def _check_row(what: str, function: Callable, opened: Table) -> None:
  """Refuses the table of another package's source whose first row is not a mapping."""
  with plugins.one_line_errors(f"{what}, row 0", function):
    try:
      row = opened[0]
    except BadRow:  # counted when the row is read again
      return
  if not isinstance(row, Mapping):
    raise UserError(f"{what} must return rows that are mappings (got {type(row).__name__})")
