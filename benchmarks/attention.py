r"""Timings of attention alone, forward and backward, with the shapes of real UNets.

  python benchmarks/attention.py --against=torch
  python benchmarks/attention.py --against=torch --dtype=bfloat16 --kernels xla cudnn \
    --shapes 16x4096x8x40 16x1024x8x80 16x256x8x160 16x4096x10x64

A shape is batch x tokens x heads x head size. 'plain' stores all logits, as diffusers' Flax
modules do; PyTorch's is `scaled_dot_product_attention`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import side_by_side

from jaxpref import sharding
from jaxpref.base_config import DTYPES
from jaxpref.models import kernels
from jaxpref.runtime import jax_setup

KERNELS = ("plain", "xla", "cudnn", "splash")
SHAPES = ["2x256x4x40", "2x64x4x64"]


def main(argv: list[str]) -> None:
  """Times the kernels that the flags name."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--shapes", nargs="+", default=SHAPES)
  add("--kernels", nargs="+", default=["plain", "xla"], choices=KERNELS)
  add("--dtype", default="float32", choices=DTYPES)
  add("--against", default="", choices=("", "torch"))
  add("--turns", type=int, default=15)
  add("--out", type=Path)
  options = parser.parse_args(argv)
  jax_setup.use_all_cores()
  print(f"{jax.devices()[0].device_kind}, {options.dtype}; milliseconds, medians")
  numbers = {"device": jax.devices()[0].device_kind, "dtype": options.dtype, "shapes": {}}
  for text in options.shapes:
    shape = tuple(map(int, text.split("x")))
    contenders = {name: ours(name, shape, options.dtype) for name in options.kernels}
    if options.against:
      contenders["torch"] = theirs(shape, options.dtype)
    took = side_by_side.take_turns(contenders, options.turns)
    medians = {name: 1e3 * statistics.median(times) for name, times in took.items()}
    numbers["shapes"][text] = medians
    print(text, "  ".join(f"{name} {ms:.3f}" for name, ms in medians.items()), flush=True)
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def ours(name: str, shape: tuple[int, ...], dtype: str):
  """Returns a function that computes loss and gradients with one of jaxpref's kernels."""
  query, key, value = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(3))
  scale, mesh = shape[-1] ** -0.5, sharding.make_mesh()

  @jax.jit
  def run(query, key, value):
    def loss(query, key, value):
      if name == "plain":
        logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
      else:
        out = kernels.dot_product_attention(
          *(query, key, value), scale=scale, kernel=name, mesh=mesh
        )
      return jnp.square(out.astype(jnp.float32)).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)

  return lambda: jax.block_until_ready(run(query, key, value))


def theirs(shape: tuple[int, ...], dtype: str):
  """Returns a function that computes the same with PyTorch's fused attention."""
  import torch  # late, because jaxpref's kernels do not need it

  device = "cuda" if torch.cuda.is_available() else "cpu"
  batch, tokens, heads, size = shape
  tensors = [
    torch.randn(
      batch, heads, tokens, size, device=device, dtype=getattr(torch, dtype), requires_grad=True
    )
    for _ in range(3)
  ]

  def run():
    out = torch.nn.functional.scaled_dot_product_attention(*tensors)
    torch.autograd.grad(out.float().square().sum(), tensors)
    if device == "cuda":
      torch.cuda.synchronize()

  return run


if __name__ == "__main__":
  main(sys.argv[1:])
