"""Devices' time by kind of operation, from the trace of a run with `--config.profile=N`.

  python -m jaxpref.main --config=configs/dro.py --config.profile=3 --workdir=runs/traced
  python benchmarks/read_profile.py runs/traced/profile

The script sums the trace by kind of operation, the largest first. For a timeline open the same
directory in XProf, TensorBoard or Perfetto.
"""

import argparse
import collections
import re
import sys
from pathlib import Path

import jax

# Events of host threads that contain or wait for operations.
_AROUND = re.compile(r"ThunkExecutor|Rendezvous|Wait|Execute|Pjit|Launch|^\$|Arguments|^\[|::")


def main(argv: list[str]) -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("profile", type=Path, help="the `profile` directory of a run")
  parser.add_argument("--top", type=int, default=15, help="number of kinds to show")
  options = parser.parse_args(argv)
  files = sorted(options.profile.rglob("*.xplane.pb"))
  if not files:
    sys.exit(f"{options.profile} does not hold a trace (*.xplane.pb)")
  spent: collections.Counter[str] = collections.Counter()
  count: collections.Counter[str] = collections.Counter()
  newest = [f for f in files if f.parent == files[-1].parent]  # one file per host
  planes = [p for f in newest for p in jax.profiler.ProfileData.from_file(str(f)).planes]
  devices = [p for p in planes if p.name.startswith(("/device:GPU", "/device:TPU"))]
  for plane in devices or planes:
    for line in plane.lines:
      for event in line.events:
        if not _AROUND.search(event.name):
          kind = re.sub(r"[.\d]+$", "", event.name)
          spent[kind] += event.duration_ns
          count[kind] += 1
  total = sum(spent.values())
  print(f"{total / 1e6:.0f} ms of operations, on all devices\n")
  print("| operation | calls | ms | share |\n|---|---|---|---|")
  for kind, ns in spent.most_common(options.top):
    print(f"| {kind} | {count[kind]} | {ns / 1e6:.1f} | {100 * ns / total:.1f} % |")


if __name__ == "__main__":
  main(sys.argv[1:])
