"""Builds data sets from rows with faults and from damaged files, and checks what is stored.

  python benchmarks/fuzz_rows.py --rows 10000 --out docs/reliability/rows.json

Two kinds of samples of every format take turns. In the first, about a third of the rows have a
known fault: what is stored must be the other rows, each with its own images and labels, and the
report must add up. In the second, bytes of the files are damaged, too: the build must end, with
a report that adds up or with one line that names the problem; a stored row with a written row's
caption must have its labels, unless a file with labels was damaged.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import formats
import numpy as np
import tensorflow_datasets as tfds

from jaxpref.data import commands

PER_SAMPLE = 60
# Files in which labels stand, by the ends of their names.
_WITH_LABELS = (".parquet", ".json", ".csv", ".tar", ".jsonl")


def build(name: str, root: Path, out: Path) -> tuple[int, str]:
  """Builds a sample in this process; returns the exit status and what was printed as errors."""
  kind = formats.FORMATS[name]
  given: dict[str, Any] = {"source": kind.source, "path": root / kind.file, "out": out}
  given |= {"table": kind.table, "split": kind.split, "processes": 1, "max-bad-share": 1.0}
  given |= {"rows-per-shard": 25}
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()) as errors,
  ):
    status = commands.main(["build", *(f"--{k}={v}" for k, v in given.items())])
  return status, errors.getvalue()


def check_whole(name: str, items: list[formats.Item], out: Path) -> int:
  """Checks a sample with known faults; returns the number of stored rows."""
  facts = json.loads((out / "complete.json").read_text(encoding="utf-8"))
  rows = list(tfds.builder_from_directory(out).as_data_source("train"))
  good = formats.expected(name, items)
  check_report(facts["report"], len(rows))
  if len(rows) != len(good):
    raise AssertionError(f"{len(rows)} rows are stored of {len(good)} good ones")
  for row, item in zip(rows, good, strict=True):
    formats.check_row(name, row, item)
  return len(rows)


def check_report(report: dict[str, Any], stored: int) -> None:
  """Checks that a report adds up."""
  left_out = sum(report["left_out"].values())
  if not report["rows"] - left_out == report["stored"] == stored:
    raise AssertionError(f"the report does not add up: {report}")


def damage(root: Path, rng: np.random.Generator) -> list[Path]:
  """Damages one to four files; returns them."""
  files = sorted(path for path in root.rglob("*") if path.is_file())
  count = min(len(files), int(rng.integers(1, 5)))
  chosen = [files[i] for i in rng.choice(len(files), count, replace=False)]
  for path in chosen:
    content = bytearray(path.read_bytes())
    match rng.integers(4):
      case 0:
        content = content[: rng.integers(len(content) + 1)]
      case 1:
        content = bytearray(rng.bytes(int(rng.integers(200))))
      case 2:
        for place in rng.integers(0, max(len(content), 1), 4):
          if content:
            content[place] ^= 1 << int(rng.integers(8))
      case 3:
        start = int(rng.integers(len(content) + 1))
        content[start:start] = rng.bytes(int(rng.integers(1, 9)))
    path.write_bytes(content)
  return chosen


def check_damaged(
  name: str, items: list[formats.Item], damaged: list[Path], out: Path, status: int, said: str
) -> str:
  """Checks a sample with damaged files; returns what came of it."""
  lines = [line for line in said.splitlines() if line.startswith("jaxpref: error:")]
  if status:
    if status != 2 or len(lines) != 1:  # noqa: PLR2004
      raise AssertionError(f"status {status}: {said[-500:]}")
    return "refused"
  facts = json.loads((out / "complete.json").read_text(encoding="utf-8"))
  rows = list(tfds.builder_from_directory(out).as_data_source("train"))
  check_report(facts["report"], len(rows))
  if any(path.name.endswith(_WITH_LABELS) for path in damaged) or name == "prompts":
    return "built"
  written = {" ".join(i.caption.split()): i for i in items if isinstance(i.caption, str)}
  for row in rows:
    caption = " ".join(row["prompt" if name == "hpd_lists" else "caption"].decode().split())
    item = written.get(caption)
    if item is None or item.fault:
      continue
    labels = [float(row[c]) for c in sorted(row) if c.startswith(("label_", "rank_"))]
    if name == "pair_folders":
      labels = []  # by names: the chosen image always comes first
    if labels and labels != [float(label) for label in item.labels]:
      raise AssertionError(f"the labels of {caption!r} are {labels}, not {item.labels}")
    if "liked" in row and bool(row["liked"]) != item.labels[0]:
      raise AssertionError(f"the label of {caption!r} is not {item.labels}")
  return "built"


def main() -> None:
  """Checks samples until there were enough rows with a fault."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=10_000, help="rows with a fault, at least")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path)
  flags = parser.parse_args()
  counts: Counter[str] = Counter()
  faults: Counter[str] = Counter()
  began, number = time.perf_counter(), 0
  while faults.total() < flags.rows:
    name = list(formats.FORMATS)[number % len(formats.FORMATS)]
    seed = [flags.seed, number]
    with tempfile.TemporaryDirectory() as folder:
      root, out = Path(folder) / "in", Path(folder) / "out"
      try:
        whole = number // len(formats.FORMATS) % 2 == 0
        of = int(np.random.default_rng(seed).integers(2**31))
        items = formats.make(name, root, seed=of, count=PER_SAMPLE)
        damaged = [] if whole else damage(root, np.random.default_rng([*seed, 1]))
        status, said = build(name, root, out)
        if whole:
          if status:
            raise AssertionError(said[-500:])
          counts["rows stored"] += check_whole(name, items, out)
          counts["samples with known faults"] += 1
        else:
          result = check_damaged(name, items, damaged, out, status, said)
          counts[f"samples with damaged files, {result}"] += 1
        faults.update(item.fault for item in items if item.fault)
        counts["rows"] += len(items)
      except Exception as error:
        raise SystemExit(f"sample {number} ({name}, seed {flags.seed}): {error!r}") from error
    number += 1
  result = {
    "date": date.today().isoformat(),
    "seed": flags.seed,
    "samples": number,
    **counts,
    "rows with a fault": dict(faults.most_common()),
    "seconds": round(time.perf_counter() - began),
  }
  print(json.dumps(result, indent=1))
  if flags.out:
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
