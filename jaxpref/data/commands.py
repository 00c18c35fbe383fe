"""The program `python -m jaxpref.data`.

  python -m jaxpref.data build --source=folder --path=FOLDER --out=DIR
  python -m jaxpref.data cache DIR --model=MODEL
  python -m jaxpref.data inspect DIR

`build` reads any source once and stores its good rows; started again, it resumes an interrupted
build. `cache` encodes all images and captions of a built data set with a model, once for
all runs; `build --cache=latents,text` does so after the build. `inspect` prints the report of a
build and writes a page with random rows.
"""

import argparse
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxpref import base_config
from jaxpref.data import build_report, remote, source_flags, sources
from jaxpref.errors import UserError
from jaxpref.runtime import cli
from jaxpref.runtime.paths import user_path

_STAGED = ".source"  # copies of remote files, until the data set is built


def main(argv: list[str]) -> int:
  """Runs the command that the first argument names; returns the exit status."""
  jobs: dict[str, Callable[[list[str]], None]] = {
    "build": _build,
    "cache": _cache,
    "inspect": _inspect,
  }

  def job(arguments: list[str]) -> None:
    command, *rest = arguments or [""]
    if command in ("-h", "--help"):
      print(__doc__)
    elif command in jobs:
      with source_flags.flags_in_errors():
        jobs[command](rest)
    else:
      raise UserError(f"name a command: build, cache or inspect (got {command!r})")

  return cli.exit_status(job, argv)


def _build(argv: list[str]) -> None:
  parser = cli.Parser("Builds a data set from any source of rows.")
  add = parser.add_argument
  add("--source", required=True, help=f"one of {', '.join(sources.OWN)}, or a module")
  add("--path", default="", help="path of the source's files, or a URL: gs://, s3://, hf://")
  add("--out", required=True, type=Path, help="directory of the data set")
  source_flags.add_flags(parser)
  add("--rows-per-shard", type=cli.at_least_1, default=500, metavar="N")
  add("--least-side", type=int, default=0, metavar="PIXELS", help="leave out smaller images")
  add("--max-bad-share", type=float, default=0.25, help="largest share of unusable rows")
  add(
    "--processes",
    type=cli.at_least_1,
    default=os.cpu_count() or 1,
    metavar="N",
    help="worker processes; default: one for each core",
  )
  add("--beam", default="", metavar="RUNNER", help="build on Apache Beam: DirectRunner, ...")
  add(
    "--beam-options",
    default="",
    metavar="OPTIONS",
    help="Beam's own, separated by spaces, such as '--project=... --temp_location=gs://...'",
  )
  add("--cache", type=_kinds, default=(), metavar="KINDS", help="latents, text or both")
  _add_cache_flags(parser)
  flags = parser.parse_args(argv)
  if flags.out == Path():
    raise UserError("--out is empty")
  if flags.model and not flags.cache:
    raise UserError("--model is for --cache=latents,text, which is missing")
  if flags.cache and not flags.model:
    raise UserError("--cache needs --model, whose VAE and text encoders encode")
  if not 0 <= flags.max_bad_share <= 1:
    raise UserError(f"--max-bad-share must be between 0 and 1 (got {flags.max_bad_share:g})")
  tables = source_flags.tables_of(flags)
  out = user_path(flags.out)
  if sources.is_built(out):
    _check_same(out, flags)
    print(f"{out} is built already")
    _print_report(out)
    _make_caches(out, flags)
    return
  _check_empty(out)
  if flags.cache:
    _check_model(flags)
  from jaxpref.data import build  # noqa: PLC0415  # TFDS takes a second

  path, staged = flags.path, out / _STAGED
  if remote.is_remote(path):
    path = str(remote.fetch(path, staged))
  plan = build.Plan(
    source=flags.source,
    path=path,
    origin=flags.path if path != flags.path else "",
    table=flags.table or "",
    split=flags.split,
    follow_links=flags.follow_links,
    rows_per_shard=flags.rows_per_shard,
    least_side=flags.least_side,
  )
  plan = plan if flags.table else build.choose_table(plan, tables)
  if flags.beam:
    _check_beam()
    # It warns of packages that it can do without.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    from jaxpref.data import beam_build  # noqa: PLC0415  # an optional package

    options = flags.beam_options.split()
    beam_build.build_on(flags.beam, options, plan, out, max_bad_share=flags.max_bad_share)
  else:
    build.build(plan, out, processes=flags.processes, max_bad_share=flags.max_bad_share)
  shutil.rmtree(staged, ignore_errors=True)
  _print_report(out)
  _make_caches(out, flags)


def _check_same(out: Path, flags: argparse.Namespace) -> None:
  """Refuses to take a finished data set for one that other flags would make."""
  from jaxpref.data.sources import built  # noqa: PLC0415

  plan = built.read_facts(os.fspath(out))["plan"]
  wanted = {
    "source": flags.source,
    "path": flags.path,
    "table": flags.table or plan["table"],
    **{name: getattr(flags, name) for name in ("split", "follow_links", "rows_per_shard")},
    "least_side": flags.least_side,
  }
  there = plan | {"path": plan["origin"] or plan["path"]}
  if differ := [name for name, value in wanted.items() if there[name] != value]:
    name = differ[0]
    raise UserError(
      f"{out} is a data set that was built with --{name.replace('_', '-')}={there[name]}, not "
      f"{wanted[name]}: choose another --out"
    )


def _check_empty(out: Path) -> None:
  """Refuses to build into a directory of something else."""
  if out.exists() and not out.is_dir():
    raise UserError(f"--out: {out} is a file")
  names = [path.name for path in out.iterdir()] if out.is_dir() else []
  if names and not any(name.startswith(".") or "array_record" in name for name in names):
    raise UserError(
      f"--out: {out} is not empty ({', '.join(sorted(names)[:3])}); choose another"
    )


def _check_model(flags: argparse.Namespace) -> None:
  """Refuses a model that cannot be read before the build, which may take hours."""
  from jaxpref.models import pipeline  # noqa: PLC0415  # JAX takes seconds

  pipeline.describe_pipeline(flags.model, vae=flags.vae)


def _check_beam() -> None:
  # tensorflow_datasets needs the second one for Beam, and does not require it.
  for name, package in (("apache_beam", "apache-beam"), ("importlib_resources",) * 2):
    if importlib.util.find_spec(name) is None:
      raise UserError(f"--beam needs the package {package}: pip install 'jaxpref[beam]'")


def _cache(argv: list[str]) -> None:
  parser = cli.Parser("Encodes the images and captions of a built data set with a model.")
  parser.add_argument("directory", type=Path, help="of the data set")
  parser.add_argument(
    "--cache", type=_kinds, default=("latents", "text"), metavar="KINDS", help="default: both"
  )
  _add_cache_flags(parser)
  flags = parser.parse_args(argv)
  if not flags.model:
    raise UserError("--model is missing: it names the model whose VAE and text encoders encode")
  _make_caches(user_path(flags.directory), flags)


def _add_cache_flags(parser: cli.Parser) -> None:
  add = parser.add_argument
  add("--model", default="", help="'shapes', a directory in diffusers' layout, or a Hub id")
  add("--vae", default="", help="directory or Hub id: replaces the model's VAE")
  add("--dtype", choices=base_config.DTYPES, default="float32", help="of the text encoders")
  add("--clip-skip", type=int, default=0, help="last text encoder layers to skip")
  add("--image-size", type=int, default=0, help="as model.image_size of the run, in pixels")
  add("--crop", choices=("center", "none"), default="center", help="as data.crop of the run")
  add("--flip", action="store_true", help="also encode the mirrored images")
  add(
    "--cache-dtype",
    choices=("float16", "float32"),
    default="float16",
    help="of the stored numbers",
  )


def _make_caches(directory: Path, flags: argparse.Namespace) -> None:
  if not flags.cache:
    return
  from jaxpref.data import cache  # noqa: PLC0415  # JAX takes seconds

  made = cache.make_with_model(
    directory,
    flags.cache,
    flags.model,
    vae=flags.vae,
    dtype=flags.dtype,
    clip_skip=flags.clip_skip,
    image_size=flags.image_size,
    flip=flags.flip,
    crop=flags.crop,
    stored_dtype=flags.cache_dtype,
  )
  for path in made:
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"cache: {path} ({size / 1e6:,.0f} MB)")


def _inspect(argv: list[str]) -> None:
  parser = cli.Parser("Prints the report of a built data set and writes a page of random rows.")
  parser.add_argument("directory", type=Path, help="of the data set")
  parser.add_argument("--rows", type=cli.at_least_1, default=24, help="on the page")
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


def _kinds(text: str) -> tuple[str, ...]:
  kinds = tuple(text.split(","))
  if unknown := [kind for kind in kinds if kind not in ("latents", "text")]:
    raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither 'latents' nor 'text'")
  return kinds
