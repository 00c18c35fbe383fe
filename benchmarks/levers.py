"""What each setting that saves time or memory does to an update, against the configured one.

  python benchmarks/levers.py --out=docs/performance/cpu_levers.json

Updates of DRO and of DPO on the bundled model, or on `--model` with `--dtype` on a GPU.
Weights are random; all take turns.
"""

import argparse
import statistics
import sys

import campaign
import jax
import side_by_side

from jaxpref import flops
from jaxpref import workdir as workdir_lib

LEVERS = {  # by method: what is changed, and with which fields
  "dro": {
    "all rows drawn at once": ("rollout.batch_size=0",),
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
    "reference errors of fixed draws": ("data.noise_draws=4",),
    "LoRA, rank 8": ("lora.rank=8",),
  },
}


def main(argv: list[str]) -> None:
  """Times, prints a table, writes the file."""
  parser = side_by_side.make_parser(__doc__, method="dro", rows=32)
  parser.add_argument("--preset", default="shapes", help="of both configurations")
  options = parser.parse_args(argv)
  updates, works = {}, {}
  for method, levers in LEVERS.items():
    config = f"configs/{method}.py:{options.preset}"
    for name, fields in {"as configured": (), **levers}.items():
      own = argparse.Namespace(**vars(options) | {"config": config})
      checked = side_by_side.checked_of(own, *fields)
      updates[method, name] = side_by_side.update_of(checked)
      forward = flops.of_forward(checked.pipeline)
      works[method, name] = sum(flops.of_update(checked, forward).values())
  took = side_by_side.take_turns(updates, options.turns)
  numbers = {
    "made": campaign.made_by("python benchmarks/levers.py"),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "options": {name: str(value) for name, value in vars(options).items()},
  }
  print("| | ms | time | FLOPs |\n|---|---|---|---|")
  for (method, name), times in took.items():
    base = method, "as configured"
    ratio = statistics.median(a / b for a, b in zip(times, took[base], strict=True))
    numbers[f"{method}, {name}"] = {
      "seconds": statistics.median(times),
      "time / as configured": ratio,
      "FLOPs / as configured": works[method, name] / works[base],
    }
    print(
      f"| {method}, {name} | {1000 * statistics.median(times):.0f} | {ratio:.2f} "
      f"| {works[method, name] / works[base]:.2f} |"
    )
  if options.out:
    workdir_lib.write_json(options.out, numbers)


if __name__ == "__main__":
  main(sys.argv[1:])
