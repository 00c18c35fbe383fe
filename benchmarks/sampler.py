r"""Timings of sampling latents: DPM-Solver++ (2M) with classifier-free guidance.

  python benchmarks/sampler.py --against=torch
  python benchmarks/sampler.py --against=torch --model=jaxpref/pipelines/sd15 \
    --rows=16 --dtype=bfloat16 --rivals P1 P2

Weights are random; the bundled model is small enough for a CPU. PyTorch's part is in
`rivals.py`.
"""

import argparse
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import side_by_side

from jaxpref.diffusion import guidance, sampler, timesteps
from jaxpref.models import unet as unet_lib
from jaxpref.training import flops, programs, setup

GUIDANCE = 5.0


def main(argv: list[str]) -> None:
  """Times the samplers as the flags say."""
  parser = side_by_side.make_parser(__doc__, method="sft", rows=16)
  parser.add_argument("--steps", type=int, default=20, help="number of solver steps")
  options = parser.parse_args(argv)
  checked = side_by_side.checked_of(options)
  makers = {
    "ours": lambda: draw_of(checked, options),
    **side_by_side.rival_makers(
      options, checked, lambda rival: lambda: rival.sample(options.steps, GUIDANCE)
    ),
  }
  took = side_by_side.time_contenders(makers, options)
  side_by_side.report(
    "sampler",
    options,
    took,
    unit="images",
    units=options.rows,
    work=2 * options.rows * options.steps * flops.of_forward(checked.pipeline),
  )


def draw_of(checked: setup.Checked, options: argparse.Namespace) -> Callable[[], None]:
  """Returns jaxpref's contender: a whole trajectory of a batch in one program."""
  pipeline = checked.pipeline
  _, inputs = side_by_side.realise_run(checked)
  params, cond = unet_lib.freeze(inputs.state.params, options.dtype), inputs.batch["cond"]
  uncond = programs.abstract_rows(checked, 1)["cond"]
  uncond = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), uncond)
  denoise = unet_lib.make_denoise(pipeline.modules["unet"], mesh=checked.mesh)
  x_t = side_by_side.rows_placed(
    checked, jax.random.normal(jax.random.key(0), (options.rows, *pipeline.latent_shape))
  )

  @jax.jit
  def draw(params, x_t, cond, uncond):
    guided = guidance.classifier_free(
      lambda x, t, c: denoise(params, x, t, c), cond, uncond, GUIDANCE
    )
    levels = timesteps.uniform_grid(pipeline.schedule, options.steps, options.rows)
    return sampler.sample(guided, x_t, levels, pipeline.schedule)

  return lambda: jax.block_until_ready(draw(params, x_t, cond, uncond))


if __name__ == "__main__":
  main(sys.argv[1:])
