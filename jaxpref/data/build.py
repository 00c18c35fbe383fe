"""Building of a data set: any source is read once, checked, and stored as ArrayRecord shards.

Every row is checked as training would check it: its caption, its labels, and its images, which
are decoded whole. Images are stored as they are; those that a reader would have to rotate or
flatten (EXIF, transparency, more than 8 bits, other colour spaces) are stored as PNG.

Chunks of rows are independent jobs of worker processes; each makes one shard. A journal records
the finished chunks, so that an interrupted build resumes, and the content of every row, so that
repeated rows are left out: of equal rows the first stays, whatever the number of processes.
"""

import concurrent.futures
import functools
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref.data import bad_rows, row_index, shards, sources, stored_rows
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.journal import Chunk, Journal
from jaxpref.errors import UserError
from jaxpref.runtime import progress, workdir

NAME = "jaxpref_data"
_JOURNAL = ".build.sqlite"
_COUNTERS = ("left_out", "labels", "sizes", "words", "converted")
REPEATED = "a repeated row"
NAMED = 20  # bad rows that the report names


class Plan(NamedTuple):
  """The settings that determine a data set's files.

  Attributes:
    source: name of the source, see `jaxpref.data.sources`.
    path: of the source's files.
    origin: the URL that they were copied from, or ''.
    split: to read.
    table: 'pairs', 'images', 'singles', 'lists' or 'captions', which the source must have.
    follow_links: whether to follow links that lead out of a folder.
    rows_per_shard: rows of a chunk.
    least_side: images with a shorter side, in pixels, are left out.
    list_size: of the shapes world's ranked lists.
  """

  source: str
  path: str
  table: str
  origin: str = ""
  split: str = "train"
  follow_links: bool = False
  rows_per_shard: int = 500
  least_side: int = 0
  list_size: int = 4

  def description(self) -> str:
    """Returns a sentence on where the rows are from."""
    return f"Built from {self.source}: {self.origin or self.path}"


def build(plan: Plan, out: Path, *, processes: int, max_bad_share: float = 0.25) -> None:
  """Builds a data set, or resumes an interrupted build.

  Args:
    plan: what to build.
    out: directory of the data set.
    processes: number of worker processes; 1 works in this one.
    max_bad_share: largest share of the rows that may be unusable.

  Raises:
    UserError: the source cannot be read, too many of its rows are bad, or the directory holds
      another build.
  """
  tally = Tally(max_bad_share, "--max-bad-share")
  table, columns = open_table(plan, tally)
  files = Counter(tally.left_out)
  chunks = shards.ranges(len(table), plan.rows_per_shard)
  layout = shards.Layout(out, NAME, stored_rows.features_of(columns))
  out.mkdir(parents=True, exist_ok=True)
  journal = Journal(out / _JOURNAL, {**plan._asdict(), "rows": len(table)})
  try:
    shards.remove_temporary(layout)
    done = journal.finished()
    counts, named = journal.totals()
    tally.add(bad_rows_of(counts), named)
    todo = [i for i in range(len(chunks)) if i not in done]
    work = functools.partial(_work, plan, out, len(chunks))
    with progress.progress_bar(total=len(table), unit="row", desc=out.name) as bar:
      bar.update(len(table) - sum(len(chunks[i]) for i in todo))
      for i, found in zip(todo, _in_order(work, todo, processes), strict=True):
        chunk = found
        if repeated := journal.repeated(chunk.digests):
          # Rare: the shard is written again, without these rows.
          chunk = work(i, repeated)
        journal.add(i, chunk)
        tally.add(bad_rows_of(chunk.counts), chunk.named)
        # As soon as the rest of the rows cannot make up for it.
        tally.check(tally.left_out.total(), len(table))
        bar.update(len(chunks[i]))
    counts, named = journal.totals()
    tally.check(tally.left_out.total(), len(table))
    shards.write_info(layout, journal.lengths(), description=plan.description())
  finally:
    journal.close()
  facts = {"rows": len(table), "files": files, "read": tally.read}
  finish(plan, out, columns, facts, counts=counts, named=named)
  (out / _JOURNAL).unlink()


def finish(
  plan: Plan,
  out: Path,
  columns: tuple[str, ...],
  facts: Mapping[str, Any],
  *,
  counts: Mapping[str, Counter[str]],
  named: Sequence[str],
) -> None:
  """Writes the index and the report of a data set whose rows are written.

  Args:
    plan: what was built.
    out: directory of the data set.
    columns: of its rows.
    facts: of the source: 'rows', their number; 'files', counts by reason of files that were
      left out before they were rows; 'read', notes on what was read.
    counts: counters of the report.
    named: the first bad rows, as texts.
  """
  digest = row_index.write(out, columns, advice="delete it, and build again")
  left_out = counts.get("left_out", Counter())
  report = {
    "rows": facts["rows"],
    "stored": facts["rows"] - left_out.total(),
    **{name: dict(counts.get(name, Counter()).most_common()) for name in _COUNTERS},
    "files": dict(facts["files"]),
    "named": list(named[:NAMED]),
    "read": list(facts["read"]),
  }
  layout = shards.Layout(out, NAME, stored_rows.features_of(columns))
  sizes = shards.sizes(layout) | {n: (out / n).stat().st_size for n in row_index.FILES}
  contents = {
    **{"plan": plan._asdict(), "report": report, "sizes": sizes, "digest": digest},
    "index": row_index.checksums(out),
  }
  workdir.write_json(out / sources.COMPLETE, contents)


def bad_rows_of(counts: Mapping[str, Counter[str]]) -> Counter[str]:
  """Returns the counts of bad rows by reason; a repeated row is not one."""
  left_out = counts.get("left_out", Counter())
  return Counter({reason: n for reason, n in left_out.items() if reason != REPEATED})


def choose_table(plan: Plan, tables: Sequence[str]) -> Plan:
  """Returns the plan with the first of the tables that can be opened.

  Raises:
    UserError: none of them can be opened.
  """
  errors = []
  for table in tables:
    try:
      open_table(plan._replace(table=table), Tally())
      return plan._replace(table=table)
    except UserError as error:
      errors.append(error)
  raise errors[0]


def open_table(plan: Plan, tally: Tally) -> tuple[sources.Table, tuple[str, ...]]:
  """Opens the source's table; returns it and the columns to store.

  Raises:
    UserError: it cannot be opened, or none of its rows can be read.
  """
  data = ConfigDict(
    {
      **{name: getattr(plan, name) for name in ("path", "split", "follow_links", "list_size")},
      "experts": "top",
    }
  )
  table = sources.open_table(plan.source, plan.table, data, tally, "all")
  for i in range(len(table)):
    try:
      return table, stored_rows.columns_of(plan.table, table[i])
    except BadRow:
      continue
  raise UserError(f"{plan.path or plan.source} has no {plan.table} that can be read")


def empty_counts() -> dict[str, Counter[str]]:
  """Returns the counters of the report, all empty."""
  return {name: Counter() for name in _COUNTERS}


@functools.lru_cache(maxsize=1)
def opened(plan: Plan) -> tuple[sources.Table, tuple[str, ...]]:
  """Opens the table once in each worker process."""
  return open_table(plan, Tally())


def _work(plan: Plan, out: Path, total: int, number: int, skip: Collection[int] = ()) -> Chunk:
  """Reads, checks and writes one chunk.

  Args:
    plan: of the build.
    out: directory of the data set.
    total: number of chunks.
    number: of this chunk.
    skip: places of good rows, from 0, that are left out because an earlier row has their
      content.
  """
  table, columns = opened(plan)
  where = bad_rows.named_by(table)
  counts = empty_counts()
  named: list[str] = []
  digests: list[bytes] = []

  def rows() -> Iterator[dict[str, Any]]:
    good = 0
    for i in shards.ranges(len(table), plan.rows_per_shard)[number]:
      of_row = empty_counts()
      try:
        row, digest = stored_rows.check(table[i], columns, of_row, least_side=plan.least_side)
      except BadRow as error:
        counts["left_out"][error.reason] += 1
        named.append(f"{where(i)} ({error})")
        continue
      good += 1
      if good - 1 in skip:
        counts["left_out"][REPEATED] += 1
        continue
      for name, of in of_row.items():
        counts[name].update(of)
      digests.append(digest)
      yield row

  layout = shards.Layout(out, NAME, stored_rows.features_of(columns))
  shards.write_shard(layout, number, total, rows())
  return Chunk(len(digests), counts, named[:NAMED], digests)


def _in_order(
  work: Callable[[int], Chunk], numbers: Iterable[int], processes: int
) -> Iterator[Chunk]:
  """Yields the results of `work` in order; a few chunks ahead are under way."""
  if processes == 1:
    yield from map(work, numbers)
    return
  # Not forked: JAX and pyarrow have threads.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
    ahead: deque[concurrent.futures.Future[Chunk]] = deque()
    try:
      for number in numbers:
        ahead.append(pool.submit(work, number))
        if len(ahead) > 2 * processes:
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
