"""Timings of a convolution's gradients inside and outside of a loop.

  python benchmarks/loops.py --out=docs/performance/loops.json

XLA for CPUs computes JAX's own gradients in the body of a loop far more slowly than outside of
it, and those of `jaxpref.models.convolution` not. Micro-batches, PRDP's steps and the steps of
updates that sample are such loops.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import side_by_side

from jaxpref.models import convolution
from jaxpref.runtime import jax_setup

LENGTH = 4  # of the loops
LAYOUT = ("NHWC", "HWIO", "NHWC")
GRADIENTS = {"of the kernel": 0, "of the input": 1}


def main(argv: list[str]) -> None:
  """Times both gradients in loops, in an unrolled one, and written one after the other."""
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
      for kind, function in ways(argument).items()
    }
    took = side_by_side.take_turns(contenders, options.turns)
    straight = statistics.median(took["straight"])
    ratios = {kind: statistics.median(times) / straight for kind, times in took.items()}
    numbers["ratios"][name] = ratios
    print(name, "  ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items()), flush=True)
  if options.out:
    options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def loss(kernel: jax.Array, images: jax.Array, convolve: Callable) -> jax.Array:
  """Returns a number that depends on a convolution of images, [B, H, W, C]."""
  return jnp.square(jnp.tanh(convolve(images, kernel, (1, 1), "SAME"))).mean()


def ways(argument: int) -> dict[str, Callable]:
  """Returns jitted functions of the kernel and images that sum the gradients of each part."""
  own = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=LAYOUT)

  def gradient(kernel, part, convolve):
    return jax.grad(loss, argument)(kernel, part, convolve).sum()

  def scanned(convolve, unroll, kernel, images):
    add = lambda total, part: (total + gradient(kernel, part, convolve), None)  # noqa: E731
    return jax.lax.scan(add, 0.0, images, unroll=unroll)[0]

  def straight(convolve, kernel, images):
    return sum(gradient(kernel, part, convolve) for part in images)

  return {
    "straight": jax.jit(functools.partial(straight, own)),
    "straight, jaxpref": jax.jit(functools.partial(straight, convolution.convolve)),
    "loop": jax.jit(functools.partial(scanned, own, 1)),
    "unrolled loop": jax.jit(functools.partial(scanned, own, LENGTH)),
    "loop, jaxpref": jax.jit(functools.partial(scanned, convolution.convolve, 1)),
  }


if __name__ == "__main__":
  main(sys.argv[1:])
