"""A data set that `python -m jaxpref.data build` has made, at `data.path`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxpref.data.bad_rows import Tally
from jaxpref.data.sources import COMPLETE, Table, is_built
from jaxpref.errors import UserError
from jaxpref.runtime import workdir
from jaxpref.runtime.paths import user_path

if TYPE_CHECKING:
  from jaxpref.data.built_rows import BuiltTable

SORTED = True
_ADVICE = "build the data set again"


def tables_in(data: ConfigDict) -> tuple[str, ...]:
  """Returns the table that the data set at `data.path` has."""
  return (read_facts(data.path)["plan"]["table"],)


def open_pairs(data: ConfigDict, tally: Tally, kind: str) -> Table:
  """Opens the rows of a data set of pairs."""
  del tally, kind
  return open_set(data.path)


def open_set(path: str) -> "BuiltTable":
  """Opens a built data set at once, whatever its size.

  Raises:
    UserError: it is not there, or files are missing or truncated.
  """
  from jaxpref.data import built_rows, row_index  # noqa: PLC0415  # TFDS takes a second

  directory, facts = user_path(path), read_facts(path)
  sizes = facts["sizes"]
  there = {p.name: p.stat().st_size for p in directory.iterdir() if p.name in sizes}
  if damaged := [name for name, size in sizes.items() if there.get(name) != size]:
    raise UserError(f"{directory} is damaged: {', '.join(damaged[:3])}; {_ADVICE}")
  index = row_index.read(directory, facts["index"], advice=_ADVICE)
  return built_rows.BuiltTable(
    directory, advice=_ADVICE, index=index, digest=facts["digest"], about=_about(path, facts)
  )


def _about(path: str, facts: dict[str, Any]) -> dict[str, str]:
  """Returns labels and texts about the data set, for the report of a run."""
  plan, report = facts["plan"], facts["report"]
  origin = plan.get("origin") or plan.get("path")
  source = f"{plan.get('source')}{': ' if origin else ''}{origin}"
  left_out = ", ".join(f"{n} {reason}" for reason, n in report.get("left_out", {}).items())
  return {
    "data set": f"{path}, {report.get('stored')} {plan['table']} built from {source}",
    "left out by its build": left_out or "nothing",
  }


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
    and value.keys() == {"plan", "report", "sizes", "digest", "index"}
    and all(isinstance(value[name], dict) for name in ("plan", "report", "sizes", "index"))
    and isinstance(value["digest"], str)
    and isinstance(value["plan"].get("table"), str)
    and all(isinstance(name, str) and Path(name).name == name for name in value["sizes"])
  )
