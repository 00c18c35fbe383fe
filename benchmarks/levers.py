"""Time and FLOPs of an update under each setting that saves time or memory.

  python benchmarks/levers.py --out=docs/performance/cpu_levers.json

The updates are those of DRO and DPO on the bundled model, or on `--model` with `--dtype` on a
GPU, relative to the configured settings. Weights are random; all settings take turns.
"""

import argparse
import sys
from typing import Any

import campaign
import jax
import side_by_side

from jaxpref.runtime import workdir as workdir_lib

CONFIGURED = "as configured"
LEVERS = {  # by method: names of changes, and the fields that make them
  "dro": {
    "all rows sampled at once": ("rollout.batch_size=0",),
    "a copy of the policy that lags": ("rollout.refresh_every=2",),
    "two states of a trajectory": ("rollout.states=2",),
    "model.norm=lean": ("model.norm=lean",),
    "model.attention=xla": ("model.attention=xla",),
    "model.remat=transformer": ("model.remat=transformer",),
    "model.remat=blocks": ("model.remat=blocks",),
    "model.remat=full": ("model.remat=full",),
    "two micro-batches": ("train.accumulate=2",),
  },
  "dpo": {
    "reference errors of fixed noise": ("data.noise_draws=4",),
    "LoRA, rank 8": ("lora.rank=8",),
  },
}


def main(argv: list[str]) -> None:
  """Times the updates, prints a table and writes the file."""
  parser = side_by_side.make_parser(__doc__, method="dro", rows=32)
  parser.add_argument("--preset", default="shapes", help="preset of both configurations")
  options = parser.parse_args(argv)
  runs = {}
  for method, levers in LEVERS.items():
    own = argparse.Namespace(
      **vars(options) | {"config": f"configs/{method}.py:{options.preset}"}
    )
    for name, fields in {CONFIGURED: (), **levers}.items():
      runs[f"{method}, {name}"] = side_by_side.checked_of(own, *fields)
  found = side_by_side.time_updates(
    runs, options.turns, lambda name: f"{name.partition(', ')[0]}, {CONFIGURED}"
  )
  numbers: dict[str, Any] = {
    "made": campaign.made_by("python benchmarks/levers.py"),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "options": {name: str(value) for name, value in vars(options).items()},
  }
  for name, n in found.items():
    numbers[name] = {
      "seconds": n["seconds"],
      "time / as configured": n["time"],
      "FLOPs / as configured": n["FLOPs"],
    }
  if options.out:
    workdir_lib.write_json(options.out, numbers)


if __name__ == "__main__":
  main(sys.argv[1:])
