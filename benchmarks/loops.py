"""Timings of a convolution's gradients inside and outside of a loop.

  python benchmarks/loops.py --out=docs/performance/loops.json

XLA for CPUs computes some of these gradients in the body of a loop far more slowly than outside
of it. Micro-batches, PRDP's steps and the steps of updates that sample are such loops.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import side_by_side

from jaxpref.runtime import jax_setup

LENGTH = 4  # of the loops
GRADIENTS = {"of the kernel": 0, "of the input": 1}


def main(argv: list[str]) -> None:
  """Times both gradients in a loop, in an unrolled one, and written one after the other."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--rows", type=int, default=32)
  add("--channels", type=int, default=128)
  add("--turns", type=int, default=5)
  add("--out", type=Path)
  options = parser.parse_args(argv)
  jax_setup.use_all_cores()
  keys = jax.random.split(jax.random.key(0))
  kernel = jax.random.normal(keys[0], (3, 3, options.channels, options.channels))
  images = jax.random.normal(keys[1], (LENGTH, options.rows, 8, 8, options.channels))
  numbers = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "ratios": {}}
  for name, argument in GRADIENTS.items():
    contenders = {
      kind: lambda f=function: jax.block_until_ready(f(kernel, images))
      for kind, function in ways(jax.grad(loss, argument)).items()
    }
    took = side_by_side.take_turns(contenders, options.turns)
    straight = statistics.median(took["straight"])
    ratios = {kind: statistics.median(times) / straight for kind, times in took.items()}
    numbers["ratios"][name] = ratios
    print(name, "  ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items()), flush=True)
  if options.out:
    options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def loss(kernel: jax.Array, images: jax.Array) -> jax.Array:
  """Returns a number that depends on a convolution of images, [B, H, W, C]."""
  layout = ("NHWC", "HWIO", "NHWC")
  out = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
  return jnp.square(jnp.tanh(out)).mean()


def ways(gradient):
  """Returns jitted functions of the kernel and images that sum the gradients of each part."""

  def scanned(kernel, images, unroll):
    add = lambda total, part: (total + gradient(kernel, part).sum(), None)  # noqa: E731
    return jax.lax.scan(add, 0.0, images, unroll=unroll)[0]

  return {
    "straight": jax.jit(lambda k, x: sum(gradient(k, part).sum() for part in x)),
    "loop": jax.jit(lambda k, x: scanned(k, x, 1)),
    "unrolled loop": jax.jit(lambda k, x: scanned(k, x, LENGTH)),
  }


if __name__ == "__main__":
  main(sys.argv[1:])
