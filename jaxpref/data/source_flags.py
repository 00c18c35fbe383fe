"""The flags of command lines that read a data source, and their checks."""

import argparse
import contextlib
import re
from collections.abc import Iterator

from jaxpref.data import sources
from jaxpref.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say what to read of a source's files."""
  add = parser.add_argument
  add("--table", choices=tuple(sources.TABLES), help="default: the first that the files have")
  add("--split", default="train", help="split to read; 'all': all of them")
  add("--follow-links", action="store_true", help="follow links that lead out of a folder")


def tables_of(flags: argparse.Namespace) -> tuple[str, ...]:
  """Returns the tables that the source of the flags can open.

  Raises:
    UserError: the source does not exist, does not have `--table`, or needs `--path`.
  """
  tables = sources.tables_of(sources.find_source(flags.source))
  if flags.table and flags.table not in tables:
    raise UserError(f"--source={flags.source} has {', '.join(tables)}, not {flags.table}")
  if flags.source in sources.OWN and flags.source != "shapes" and not flags.path:
    raise UserError(f"--source={flags.source} needs --path, the path of its files")
  return tables


@contextlib.contextmanager
def flags_in_errors() -> Iterator[None]:
  """Names flags in errors of sources, which name the fields of a run's configuration."""
  try:
    yield
  except UserError as error:
    shown = re.sub(r"\bdata\.(path|source|split)\b", r"--\1", str(error))
    raise type(error)(shown) from error
