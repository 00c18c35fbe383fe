"""The program `python -m jaxpref.score`: scores the images of a data set.

  python -m jaxpref.score --path=DIR --scorers=pickscore.v1,hpsv2.v2_1

DIR is a data set of `python -m jaxpref.data build`, whose scores lie in DIR/scores; with
`--source=folder` or another source, `--out` names their directory. Each scorer has a file,
`<scorer>-<version>.parquet`. A run of training chooses experts by it:
`--config.data.score=pickscore.v1 --config.data.num_experts=500`.

Images are scored in chunks. An interrupted run resumes with the next chunk and ends with the
same bytes, and several processes can share the chunks (`--shard=I/N`): the last one joins them.
"""

import argparse
from pathlib import Path
from typing import Any

from jaxpref import scorers
from jaxpref.data import image_scores, source_flags, sources
from jaxpref.data.bad_rows import Tally
from jaxpref.data.image_scores import Facts
from jaxpref.errors import UserError
from jaxpref.runtime import cli, distributed, workdir
from jaxpref.runtime.paths import user_path
from jaxpref.score import score_parts, score_summary


def main(argv: list[str]) -> int:
  """Scores the images that the arguments name; returns the exit status."""
  return cli.exit_status(_score, argv)


def _score(argv: list[str]) -> None:
  flags = _parser().parse_args(argv)
  names = tuple(dict.fromkeys(name.strip() for name in flags.scorers.split(",")))
  functions = scorers.load_scorers(names)
  with source_flags.flags_in_errors():
    images, out = _open(flags)
  if not len(images):
    raise UserError(f"{flags.path} has no images")
  scorers.find_files(names)
  number, total = flags.shard or distributed.launched()
  facts = {
    name: Facts(name, version, images.digest, len(images))
    for name, (version, _) in functions.items()
  }
  for of in facts.values():
    image_scores.file_of(out, of)  # refuses an impossible name before hours of work
  workdir.make_writable(out)
  from jaxpref.score import chunk_scoring  # noqa: PLC0415  # TFDS takes a second

  chunk_scoring.score_share(
    *(images, {name: function for name, (_, function) in functions.items()}, facts, out),
    batch_size=flags.batch_size,
    share=(number, total),
  )
  if unfinished := [of.key() for of in facts.values() if not score_parts.merge(out, of)]:
    print(
      f"share {number} of {total} is finished, others are not: {', '.join(unfinished)}; the "
      "last process joins the chunks"
    )
    return
  files = {of.key(): image_scores.file_of(out, of) for of in facts.values()}
  print(score_summary.to_text({k: score_summary.read(f) for k, f in files.items()}))
  print("\n".join(f"scores: {file}" for file in files.values()))


def _parser() -> cli.Parser:
  parser = cli.Parser("Scores the images of a data set, from which experts are chosen.")
  add = parser.add_argument
  add("--path", default="", help="a built data set, or the source's files")
  add("--source", default="", help=f"for other files: {', '.join(sources.OWN)}, or a module")
  source_flags.add_flags(parser)
  add("--scorers", required=True, metavar="NAMES", help="FAMILY.NAME, separated by commas")
  add("--out", default="", help="directory of the scores; default: PATH/scores of a built set")
  add("--batch-size", type=cli.at_least_1, default=256, metavar="N", help="images read at once")
  add(
    "--shard",
    type=cli.share,
    metavar="I/N",
    help="score the share I, from 0, of N; default: that of a launcher's process, else all",
  )
  return parser


def _open(flags: argparse.Namespace) -> tuple[Any, Path]:
  """Opens the images; returns them and the directory of their scores."""
  from jaxpref.data import build  # noqa: PLC0415  # TFDS takes a second
  from jaxpref.score import image_reader  # noqa: PLC0415

  if sources.is_built(flags.path):
    if flags.source not in ("", "built"):
      raise UserError(f"{flags.path} is a built data set: leave out --source={flags.source}")
    out = flags.out or user_path(flags.path) / image_scores.FOLDER
    return image_reader.open_built(flags.path), user_path(out)
  if flags.source in ("", "built"):
    raise UserError(
      f"--path={flags.path} is not a built data set; name what its files are with --source"
    )
  tables = source_flags.tables_of(flags)
  if not flags.out:
    raise UserError("--out is missing: the directory of the scores")
  plan = build.Plan(
    source=flags.source,
    path=flags.path,
    table=flags.table or "",
    split=flags.split,
    follow_links=flags.follow_links,
  )
  plan, tally = plan if flags.table else build.choose_table(plan, tables), Tally()
  opened = image_reader.open_source(plan, tally)
  tally.warn(flags.path or flags.source, "file")
  return opened, user_path(flags.out)
