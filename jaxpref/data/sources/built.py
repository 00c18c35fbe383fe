"""A data set that `python -m jaxpref.data build` has made, at `data.path`."""

from pathlib import Path
from typing import Any

from jaxpref.data.bad_rows import Tally
from jaxpref.data.sources import COMPLETE, Table, is_built
from jaxpref.errors import UserError
from jaxpref.runtime import workdir
from jaxpref.runtime.paths import user_path

SORTED = True
_ADVICE = "build the data set again"


def tables_in(data: Any) -> tuple[str, ...]:
  """Returns the table that the data set at `data.path` has."""
  return (read_facts(data.path)["plan"]["table"],)


def open_pairs(data: Any, tally: Tally, kind: str) -> Table:
  """Opens the rows of a data set of pairs."""
  del tally, kind
  from jaxpref.runtime import records  # noqa: PLC0415  # TFDS takes a second

  directory, sizes = user_path(data.path), read_facts(data.path)["sizes"]
  there = {p.name: p.stat().st_size for p in directory.iterdir() if p.name in sizes}
  if damaged := [name for name, size in sizes.items() if there.get(name) != size]:
    raise UserError(f"{directory} is damaged: {', '.join(damaged[:3])}; {_ADVICE}")
  return records.Records(directory, "train", advice=_ADVICE)


# One reader serves every table; `tables_in` says which one is there.
open_images = open_singles = open_lists = open_captions = open_pairs


def read_facts(path: str) -> dict[str, Any]:
  """Reads the plan, the report and the sizes of a built data set.

  Raises:
    UserError: the directory has no finished data set.
  """
  if not is_built(path):
    raise UserError(
      f"data.path {path!r} is not a data set of `python -m jaxpref.data build`, or not finished"
    )
  return workdir.read_json(user_path(path) / COMPLETE, _is_facts)


def _is_facts(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and value.keys() == {"plan", "report", "sizes"}
    and all(isinstance(of, dict) for of in value.values())
    and isinstance(value["plan"].get("table"), str)
    and all(isinstance(name, str) and Path(name).name == name for name in value["sizes"])
  )
