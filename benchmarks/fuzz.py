"""A fuzzer that feeds damaged inputs to every reader of jaxpref.

  python benchmarks/fuzz.py --inputs=10000 --seed=1 --out=docs/reliability/fuzz.json

Each target of `fuzz_targets` has its own process with a limit on memory; each input has a limit
on time. Finished targets are recorded in the file, so an interrupted campaign resumes. The
table goes into `docs/reliability.md`.
"""

import argparse
import collections
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import fuzz_runner  # noqa: E402
import fuzz_targets  # noqa: E402

_BEGIN, _END = "<!-- fuzzed: -->", "<!-- fuzzed until here. -->"
_GIB = 1 << 30
_MEMORY = 2 * _GIB  # address space, in addition to a process's size at the start
_KINDS = ("equal", "other", "refused", "traceback", "hang", "silent")
_BAD = ("traceback", "hang", "silent")
_NAMED = 40  # maximum number of recorded failures per target


def main() -> int:
  """Runs the missing targets and writes the table; returns 1 if any input failed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--inputs", type=int, default=10_000, help="total number of inputs")
  add("--seed", type=int, default=0)
  add("--out", type=Path, required=True, help="a JSON file for the results")
  add("--only", default="", help="a regular expression that the targets' names must match")
  add("--table", type=Path, help="a Markdown file with the table to replace")
  options = parser.parse_args()
  record: dict[str, Any] = {"seed": options.seed, "inputs": options.inputs, "targets": {}}
  if options.out.exists():
    found = json.loads(options.out.read_text(encoding="utf-8"))
    if (found["seed"], found["inputs"]) == (options.seed, options.inputs):
      record = found
  record["made"] = {
    "date": datetime.date.today().isoformat(),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    "python": platform.python_version(),
    "versions": {
      name: metadata.version(name)
      for name in ("hypothesis", "jax", "orbax-checkpoint", "pillow", "pyarrow", "safetensors")
      + ("tokenizers", "transformers")
    },
  }
  everything = fuzz_targets.targets()
  weights = sum(target.weight for target in everything)
  with tempfile.TemporaryDirectory() as scratch:
    tiny = _in_a_process(_write_tiny, Path(scratch) / "tiny")
    for target in everything:
      if target.name in record["targets"] or not re.search(options.only, target.name):
        continue
      count = -(-options.inputs * target.weight // weights)
      record["targets"][target.name] = _run(target, count, options.seed, Path(scratch), tiny)
      _show(target.name, record["targets"][target.name])
      options.out.parent.mkdir(parents=True, exist_ok=True)
      options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
  if options.table:
    _write_table(options.table, record)
  return int(any(t["counts"].get(k) for t in record["targets"].values() for k in _BAD))


def _write_tiny(directory: Path) -> None:
  import families

  directory.mkdir()
  families.write_tiny(directory)


def _in_a_process(job: Any, directory: Path) -> Path:
  """Runs a job in another process, because a process that has used JAX cannot be forked."""
  process = multiprocessing.get_context("fork").Process(target=job, args=(directory,))
  process.start()
  process.join()
  return directory / "pipeline"


def _run(
  target: fuzz_runner.Target, count: int, seed: int, scratch: Path, tiny: Path
) -> dict[str, Any]:
  """Runs all inputs of a target; a crash or a hang of its process is an outcome, too."""
  context = multiprocessing.get_context("fork")
  counts: collections.Counter[str] = collections.Counter()
  failures: list[dict[str, Any]] = []
  longest, peak, number, since = "", 0, 0, time.monotonic()
  while number < count:
    ours, theirs = context.Pipe()
    work = (target, range(number, count), seed, scratch, tiny, theirs)
    process = context.Process(target=_work, args=work)
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):
      while number < count:
        # The first input waits for the valid one. Signals do not interrupt code in C.
        if not ours.poll(120 if not counts else 4 * fuzz_runner.SECONDS):
          kind, text, memory = "hang", "in a library's C code", 0
          process.kill()
        else:
          kind, text, memory = ours.recv()
        counts[kind] += 1
        peak = max(peak, memory)
        if kind == "refused":
          longest = max(longest, text, key=len)
        if kind in _BAD and len(failures) < _NAMED:
          failures.append({"input": number, "kind": kind, "text": text})
        number += 1
    process.join()
    if number < count and process.exitcode:
      text = f"its process ended with {process.exitcode}"
      counts["traceback"] += 1
      failures.append({"input": number, "kind": "traceback", "text": text})
      if process.exitcode > 0:  # the valid input could not be read
        break
      number += 1
  return {
    "inputs": number,
    "counts": dict(counts),
    "peak_mb": round(peak / 1e6),
    "longest": longest,
    "seconds": round(time.monotonic() - since, 1),
    "failures": failures,
  }


def _work(target: Any, numbers: range, seed: int, scratch: Path, tiny: Path, pipe: Any) -> None:
  """Runs inputs in a process of its own and sends their outcomes."""
  os.chdir(scratch)
  null = os.open(os.devnull, os.O_WRONLY)
  prepared = fuzz_runner.Prepared(target, scratch / "work", tiny)
  prepared.run(seed, -1)  # so that imports and caches do not count for the first input
  said = os.dup(2)
  os.dup2(null, 1)
  os.dup2(null, 2)
  pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
  limit = pages * resource.getpagesize() + _MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  # Resets the peak memory.
  Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
  begin = _highest()
  try:
    for number in numbers:
      outcome = prepared.run(seed, number)
      pipe.send((outcome.kind, outcome.text, _highest() - begin))
  except BaseException:  # a defect of the fuzzer
    os.dup2(said, 2)
    raise


def _highest() -> int:
  """Returns the peak memory of this process in bytes."""
  status = Path("/proc/self/status").read_text(encoding="utf-8")
  return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _show(name: str, found: dict[str, Any]) -> None:
  counts = ", ".join(f"{found['counts'][k]} {k}" for k in _KINDS if found["counts"].get(k))
  print(f"{name}: {counts}; {found['peak_mb']} MB, {found['seconds']} s", flush=True)
  for failure in found["failures"][:12]:
    print(f"  {failure['input']} {failure['kind']} {failure['text']}", flush=True)


def _write_table(file: Path, record: dict[str, Any]) -> None:
  """Replaces the text between the marks."""
  made, found = record["made"], record["targets"]
  total = sum(t["inputs"] for t in found.values())
  versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
  lines = [
    f"Made by `python benchmarks/fuzz.py` on {made['date']}: {made['machine']}, Python "
    f"{made['python']}, {versions}; seed {record['seed']}; {total:,} inputs.",
    "",
    "| target | inputs | accepted, equal | accepted, other | refused | tracebacks | hangs "
    "| silently other | peak memory, MB | longest refusal |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, one in found.items():
    cells = [str(one["counts"].get(kind, 0)) for kind in _KINDS]
    row = [name, str(one["inputs"]), *cells, f"+{one['peak_mb']}", str(len(one["longest"]))]
    lines.append(f"| {' | '.join(row)} |")
  sums = [sum(t["counts"].get(k, 0) for t in found.values()) for k in _KINDS]
  peak = max(t["peak_mb"] for t in found.values())
  longest = max(len(t["longest"]) for t in found.values())
  row = ["all", str(total), *map(str, sums), f"+{peak}", str(longest)]
  lines.append(f"| {' | '.join(row)} |")
  text = file.read_text(encoding="utf-8")
  head, _, rest = text.partition(_BEGIN)
  tail = rest.partition(_END)[2]
  body = "\n".join(lines)
  file.write_text(f"{head}{_BEGIN}\n{body}\n{_END}{tail}", encoding="utf-8")


if __name__ == "__main__":
  sys.exit(main())
