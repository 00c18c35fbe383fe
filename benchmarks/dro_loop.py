r"""Timings of Diffusion-DRO's updates with their rollouts: as published, and in chunks.

  python benchmarks/dro_loop.py --against=torch
  python benchmarks/dro_loop.py --against=torch --model=jaxpref/pipelines/sd15 \
    --rows=32 --lots=8 --dtype=bfloat16 --set rollout.num_steps=20

Weights are random; the bundled model is small enough for a CPU. PyTorch's part is in
`rivals.py`.
"""

import sys

import side_by_side

from jaxpref.training import flops
from jaxpref.training import rollout as rollout_lib


def main(argv: list[str]) -> None:
  """Times the updates as the flags say."""
  parser = side_by_side.make_parser(__doc__, method="dro", rows=32)
  parser.add_argument("--lots", type=int, default=8, help="rollout.batch_size, the chunk size")
  options = parser.parse_args(argv)
  checked = side_by_side.checked_of(options, f"rollout.batch_size={options.lots}")
  published = side_by_side.checked_of(options, "rollout.batch_size=0")
  if (
    rollout_lib.chunk_size(options.rows, options.lots, devices=checked.mesh.size)
    == options.rows
  ):
    parser.error("with these --lots, a single chunk has all --rows: set a smaller number")
  num_steps = checked.config.rollout.num_steps
  makers = {
    "ours": lambda: side_by_side.update_of(checked),
    "ours, all rows at once": lambda: side_by_side.update_of(published),
    **side_by_side.rival_makers(options, checked, lambda rival: lambda: rival.dro(num_steps)),
  }
  took = side_by_side.time_contenders(makers, options)
  forward = flops.of_forward(checked.pipeline)
  # Rivals sample whole trajectories, and compute a gradient on their own samples that is zero.
  works = dict.fromkeys(makers, options.rows * (num_steps + 2 + 6) * forward)
  works["ours"] = sum(flops.of_update(checked, forward).values())
  works["ours, all rows at once"] = sum(flops.of_update(published, forward).values())
  side_by_side.report(
    "DRO",
    options,
    took,
    unit="pairs",
    units=options.rows,
    work=works,
  )


if __name__ == "__main__":
  main(sys.argv[1:])
