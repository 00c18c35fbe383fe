"""An update of each method, with as many training images, against one of SFT.

  python benchmarks/method_times.py --out=docs/methods/times.json

The methods and their rows are those of `methods.py`, whose table shows what this writes;
`--methods dro --samplers --out=docs/dro/times.json` times those of `dro_ablations.py`.
Weights are random; the methods take turns.
"""

import argparse
import statistics
import sys

import campaign
import dro_ablations
import jax
import methods
import side_by_side

from jaxpref import flops
from jaxpref import workdir as workdir_lib

SAMPLERS = dro_ablations.ABLATIONS["sampler"].variants


def main(argv: list[str]) -> None:
  """Times, prints a table, writes the file."""
  parser = side_by_side.make_parser(__doc__, method="sft", rows=methods.IMAGES)
  parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), metavar="METHOD")
  parser.add_argument("--preset", default="shapes", help="of all configurations")
  parser.add_argument("--samplers", action="store_true", help="and DRO's ways to draw")
  options = parser.parse_args(argv)
  updates, works = {}, {}
  samplers = [f"dro, {sampler}" for sampler in SAMPLERS] if options.samplers else []
  for name in dict.fromkeys(["sft", *options.methods, *samplers]):
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
    workdir_lib.write_json(options.out, numbers)


def _checked(name: str, options: argparse.Namespace):
  name, _, sampler = name.partition(", ")
  method, fields = methods.METHODS[name], SAMPLERS.get(sampler, ())
  own = {
    "config": f"configs/{method.config}.py:{options.preset}",
    "rows": options.rows // method.images,
  }
  return side_by_side.checked_of(
    argparse.Namespace(**(vars(options) | own)), *method.fixed, *fields
  )


if __name__ == "__main__":
  main(sys.argv[1:])
