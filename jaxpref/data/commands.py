"""The program `python -m jaxpref.data`.

  python -m jaxpref.data build --source=folder --path=PICTURES --out=DIR
  python -m jaxpref.data inspect DIR

`build` reads any source once and stores its good rows; started again, it goes on where it was
interrupted. `inspect` prints the report of a build and writes a page with random rows.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from jaxpref.data import build_report, sources
from jaxpref.errors import UserError
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path


def main(argv: list[str]) -> int:
  """Runs the command that the first argument names; returns the exit status."""
  jobs: dict[str, Callable[[list[str]], None]] = {"build": _build, "inspect": _inspect}

  def job(arguments: list[str]) -> None:
    command, *rest = arguments or [""]
    if command in ("-h", "--help"):
      print(__doc__)
    elif command in jobs:
      jobs[command](rest)
    else:
      raise UserError(f"name a command: {' or '.join(jobs)} (got {command!r})")

  return cli.exit_status(job, argv)


def _build(argv: list[str]) -> None:
  parser = cli.Parser("Builds a data set from any source of rows.")
  add = parser.add_argument
  add("--source", required=True, help=f"one of {', '.join(sources.OWN)}, or a module")
  add("--path", default="", help="path of the source's files")
  add("--out", required=True, type=Path, help="directory of the data set")
  add("--table", choices=tuple(sources.TABLES), help="default: the first that the files have")
  add("--split", default="train", help="split to read; 'all': all of them")
  add("--follow-links", action="store_true", help="follow links that lead out of a folder")
  add("--rows-per-shard", type=_at_least_1, default=500, metavar="N")
  add("--least-side", type=int, default=0, metavar="PIXELS", help="leave out smaller images")
  add("--max-bad-share", type=float, default=0.25, help="largest share of unusable rows")
  add(
    "--processes",
    type=_at_least_1,
    default=os.cpu_count() or 1,
    metavar="N",
    help="worker processes; default: one for each core",
  )
  flags = parser.parse_args(argv)
  if flags.out == Path():
    raise UserError("--out is empty")
  if not 0 <= flags.max_bad_share <= 1:
    raise UserError(f"--max-bad-share must be between 0 and 1 (got {flags.max_bad_share:g})")
  source = sources.find_source(flags.source)
  tables = sources.tables_of(source)
  if flags.table and flags.table not in tables:
    raise UserError(f"--source={flags.source} has {', '.join(tables)}, not {flags.table}")
  out = user_path(flags.out)
  if (out / sources.COMPLETE).exists():
    print(f"{out} is built already")
    _print_report(out)
    return
  from jaxpref.data import build  # noqa: PLC0415  # TFDS takes a second

  plan = build.Plan(
    source=flags.source,
    path=flags.path,
    table=flags.table or "",
    split=flags.split,
    follow_links=flags.follow_links,
    rows_per_shard=flags.rows_per_shard,
    least_side=flags.least_side,
  )
  plan = plan if flags.table else build.choose_table(plan, tables)
  build.build(plan, out, processes=flags.processes, max_bad_share=flags.max_bad_share)
  _print_report(out)


def _inspect(argv: list[str]) -> None:
  parser = cli.Parser("Prints the report of a built data set and writes a page of random rows.")
  parser.add_argument("directory", type=Path, help="of the data set")
  parser.add_argument("--rows", type=_at_least_1, default=24, help="on the page")
  parser.add_argument("--seed", type=int, default=0, help="selects the rows of the page")
  flags = parser.parse_args(argv)
  directory = user_path(flags.directory)
  _print_report(directory)
  from jaxpref.data import inspect_page  # noqa: PLC0415

  page = inspect_page.write(directory, rows=flags.rows, seed=flags.seed)
  print(f"page: {page}")


def _print_report(directory: Path) -> None:
  from jaxpref.data.sources import built  # noqa: PLC0415

  facts = built.read_facts(os.fspath(directory))
  print("\n".join(build_report.report_lines(facts["plan"], facts["report"])))


def _at_least_1(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
  return int(text)
