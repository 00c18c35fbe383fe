r"""Timings of an update of supervised fine-tuning: forward, backward, AdamW, EMA.

  python benchmarks/train_step.py --against=torch
  python benchmarks/train_step.py --against=torch --model=jaxpref/pipelines/sd15 \
    --rows=32 --dtype=bfloat16 --rivals P1 P2

Weights are random; the bundled model is small enough for a CPU. PyTorch's part is in
`rivals.py`.
"""

import sys

import side_by_side

from jaxpref.training import flops


def main(argv: list[str]) -> None:
  """Times the update as the flags say."""
  options = side_by_side.make_parser(__doc__, method="sft", rows=32).parse_args(argv)
  checked = side_by_side.checked_of(options)
  makers = {
    "ours": lambda: side_by_side.update_of(checked),
    **side_by_side.rival_makers(options, checked, lambda rival: rival.sft),
  }
  took = side_by_side.time_contenders(makers, options)
  forward = flops.of_forward(checked.pipeline)
  side_by_side.report(
    "train step",
    options,
    took,
    unit="images",
    units=options.rows,
    work=sum(flops.of_update(checked, forward).values()),
  )


if __name__ == "__main__":
  main(sys.argv[1:])
