"""An update of each method, with as many training images, against one of SFT.

  python benchmarks/method_times.py --out=docs/methods/times.json

The methods and their rows are those of `methods.py`, whose table shows what this writes.
Weights are random; the methods take turns.
"""

import argparse
import json
import statistics
import sys

import campaign
import jax
import methods
import side_by_side

from jaxpref import flops


def main(argv: list[str]) -> None:
  """Times, prints a table, writes the file."""
  parser = side_by_side.make_parser(__doc__, method="sft", rows=methods.IMAGES)
  parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), metavar="METHOD")
  parser.add_argument("--preset", default="shapes", help="of all configurations")
  options = parser.parse_args(argv)
  updates, works = {}, {}
  for name in dict.fromkeys(["sft", *options.methods]):
    checked = _checked(name, options)
    updates[name] = side_by_side.update_of(checked)
    works[name] = sum(flops.of_update(checked, flops.of_forward(checked.pipeline)).values())
  took = side_by_side.take_turns(updates, options.turns)
  ratios = {
    name: statistics.median(mine / sft for mine, sft in zip(times, took["sft"], strict=True))
    for name, times in took.items()
  }
  numbers = {
    "made": campaign.made_by("python benchmarks/method_times.py"),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "seconds": {name: statistics.median(times) for name, times in took.items()},
    "time / SFT's": ratios,
    "FLOPs / SFT's": {name: work / works["sft"] for name, work in works.items()},
  }
  print("| method | ms | time / SFT's | FLOPs / SFT's |\n|---|---|---|---|")
  for name, ratio in ratios.items():
    milliseconds = 1000 * numbers["seconds"][name]
    work = numbers["FLOPs / SFT's"][name]
    print(f"| {name} | {milliseconds:.0f} | {ratio:.2f} | {work:.2f} |")
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(numbers, indent=1) + "\n")


def _checked(name: str, options: argparse.Namespace):
  method = methods.METHODS[name]
  own = {
    "config": f"configs/{method.config}.py:{options.preset}",
    "rows": options.rows // method.images,
  }
  return side_by_side.checked_of(argparse.Namespace(**(vars(options) | own)), *method.fixed)


if __name__ == "__main__":
  main(sys.argv[1:])
