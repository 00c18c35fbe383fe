"""Time and FLOPs of each method's update relative to SFT's, for equal numbers of images.

  python benchmarks/method_times.py --out=docs/methods/times.json

The methods and their rows are those of `methods.py`, whose table shows these numbers.
`--methods dro --samplers --out=docs/dro/times.json` times the samplers of `dro_ablations.py`.
Weights are random; the methods take turns.
"""

import argparse
import sys

import campaign
import dro_ablations
import jax
import methods
import side_by_side

from jaxpref.runtime import workdir as workdir_lib

SAMPLERS = dro_ablations.ABLATIONS["sampler"].variants


def main(argv: list[str]) -> None:
  """Times the updates, prints a table and writes the file."""
  parser = side_by_side.make_parser(__doc__, method="sft", rows=methods.IMAGES)
  parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), metavar="METHOD")
  parser.add_argument("--preset", default="shapes", help="preset of all configurations")
  parser.add_argument("--samplers", action="store_true", help="also time DRO's samplers")
  options = parser.parse_args(argv)
  samplers = [f"dro, {sampler}" for sampler in SAMPLERS] if options.samplers else []
  names = dict.fromkeys(["sft", *options.methods, *samplers])
  runs = {name: _checked(name, options) for name in names}
  found = side_by_side.time_updates(runs, options.turns, lambda name: "sft")
  of = lambda what: {name: n[what] for name, n in found.items()}  # noqa: E731
  numbers = {
    "made": campaign.made_by("python benchmarks/method_times.py"),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "seconds": of("seconds"),
    "time / SFT's": of("time"),
    "FLOPs / SFT's": of("FLOPs"),
  }
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
