"""Building of a data set on Apache Beam, for sets that take one machine too long.

The rows, their checks and their order are those of `jaxpref.data.build`; tensorflow_datasets'
Beam builder shards and writes them, on any runner: DirectRunner (this machine), Dataflow,
Spark, Flink. The workers need this package and have to see the source's files under the same
path. The index of the rows is made afterwards, by the machine that started the build.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from jaxpref.data import bad_rows, build, shards, stored_rows
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.errors import UserError, first_line

_SPACE = "jaxpref"  # of the counters


def build_on(
  runner: str, options: Sequence[str], plan: build.Plan, out: Path, *, max_bad_share: float
) -> None:
  """Builds a data set on a Beam runner.

  Args:
    runner: name of the runner, such as 'DirectRunner' or 'DataflowRunner'.
    options: Beam's own flags, such as '--project=...'.
    plan: what to build.
    out: directory of the data set.
    max_bad_share: largest share of the rows that may be unusable.

  Raises:
    UserError: the source cannot be read, too many of its rows are bad, or the pipeline failed.
  """
  tally = Tally(max_bad_share, "--max-bad-share")
  table, columns = build.open_table(plan, tally)
  files = Counter(tally.left_out)
  scratch = out / ".beam"
  shutil.rmtree(scratch, ignore_errors=True)  # of a pipeline that failed
  builder = _Builder(plan, columns, len(table), data_dir=scratch)
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(
        beam_runner=runner,
        beam_options=PipelineOptions(list(options)),
        num_shards=len(shards.ranges(len(table), plan.rows_per_shard)),
      ),
      file_format="array_record",
    )
  except Exception as error:  # runners raise errors of any type
    raise UserError(f"the build on {runner} failed: {first_line(error)}") from error
  named = [json.loads(line)[1] for line in _bad_file(scratch).read_text("utf-8").splitlines()]
  tally.add(build.bad_rows_of(builder.counts), named)
  tally.check(tally.left_out.total(), len(table))
  for path in sorted(Path(builder.data_path).iterdir()):
    path.replace(out / path.name)
  facts = {"rows": len(table), "files": files, "read": tally.read}
  build.finish(plan, out, columns, facts, counts=builder.counts, named=named)
  shutil.rmtree(scratch)


def _bad_file(scratch: Path) -> Path:
  return scratch / "bad_rows.jsonl"


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """tensorflow_datasets' builder of a plan.

  Attributes:
    counts: counters of the report, after the build.
  """

  VERSION = tfds.core.Version("1.0.0")
  name = build.NAME
  url_infos = None  # nothing is downloaded

  def __init__(self, plan: build.Plan, columns: tuple[str, ...], rows: int, *, data_dir: Path):
    self._plan, self._columns, self._rows = plan, columns, rows
    self._bad_file = _bad_file(data_dir)
    self.counts: dict[str, Counter[str]] = {}
    super().__init__(data_dir=data_dir)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=stored_rows.features_of(self._columns),
      description=self._plan.description(),
      disable_shuffling=True,  # the rows stay in the order of their keys, the source's
    )

  def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
    del dl_manager
    return {"train": self._generate_examples(pipeline)}

  def _generate_examples(self, pipeline: Any) -> Any:
    count = len(shards.ranges(self._rows, self._plan.rows_per_shard))
    read = beam.FlatMap(_read, self._plan, self._columns)
    found = (
      pipeline
      | "chunks" >> beam.Create(range(count))
      | "spread" >> beam.Reshuffle()
      | "read" >> read.with_outputs("bad", main="good")
    )
    _ = (
      found.bad
      | "first bad rows" >> beam.combiners.Top.Smallest(build.NAMED)
      | "as lines" >> beam.FlatMap(lambda bad: [json.dumps(of) for of in bad])
      | "write" >> beam.io.WriteToText(str(self._bad_file), shard_name_template="")
    )
    return found.good | "by content" >> beam.GroupByKey() | "once" >> beam.FlatMap(_first)

  def _process_pipeline_result(self, pipeline_result: Any) -> None:
    counters = pipeline_result.metrics().query()["counters"]
    for found in counters:
      if found.key.metric.namespace == _SPACE:
        name, _, key = found.key.metric.name.partition("/")
        if found.result:
          self.counts.setdefault(name, Counter())[key] += found.result


def _read(number: int, plan: build.Plan, columns: tuple[str, ...]) -> Iterator[Any]:
  """Yields a chunk's good rows by content, each with its place and counts, and its bad rows."""
  table, _ = build.opened(plan)
  where = bad_rows.named_by(table)
  for i in shards.ranges(len(table), plan.rows_per_shard)[number]:
    counts = build.empty_counts()
    try:
      row, digest = stored_rows.check(table[i], columns, counts, least_side=plan.least_side)
    except BadRow as error:
      Metrics.counter(_SPACE, f"left_out/{error.reason}").inc()
      yield beam.pvalue.TaggedOutput("bad", (i, f"{where(i)} ({error})"))
    else:
      yield digest, (i, row, counts)


def _first(group: tuple[bytes, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the first of the rows with a content."""
  rows = list(group[1])
  i, row, counts = min(rows, key=lambda found: found[0])
  Metrics.counter(_SPACE, f"left_out/{build.REPEATED}").inc(len(rows) - 1)
  for name, of in counts.items():
    for key, number in of.items():
      Metrics.counter(_SPACE, f"{name}/{key}").inc(number)
  yield i, row
