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
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from jaxpref import plugins
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


def name_of(data: Any) -> str:
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
  return found


def tables_of(source: ModuleType, data: Any = None) -> tuple[str, ...]:
  """Returns the tables that a source can open, with `data` those that its files have."""
  if data is not None and hasattr(source, "tables_in"):
    return source.tables_in(data)
  return tuple(table for table in TABLES if hasattr(source, f"open_{table}"))


def table_for(source: ModuleType, kind: str, data: Any = None) -> str | None:
  """Returns the table from which a source's rows of a kind are derived, or None."""
  tables = tables_of(source, data)
  if kind in tables:
    return kind
  # Images with captions are experts as they are; those of pairs have to be chosen.
  order = sorted(tables, key=lambda table: table != "images")
  return next((table for table in order if kind in TABLES[table]), None)


def open_table(name: str, table: str, data: Any, tally: Any, kind: str) -> Table:
  """Opens a table of a source.

  Args:
    name: of the source.
    table: one of `TABLES`, which the source must have.
    data: the configuration's section `data`.
    tally: counts what cannot be used.
    kind: the kind of rows that the caller derives.

  Raises:
    UserError: what the source returns is not a sequence.
  """
  opened = getattr(find_source(name), f"open_{table}")(data, tally, kind)
  if not (hasattr(opened, "__len__") and hasattr(opened, "__getitem__")):
    raise UserError(
      f"data.source {name!r}: open_{table} must return a sequence of rows, with len() and [i] "
      f"(got {type(opened).__name__})"
    )
  return opened
