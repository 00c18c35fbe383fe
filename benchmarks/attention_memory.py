"""Memory of attention on TPUs, by their compiler; needs `jax[tpu]`, but no TPU.

  python benchmarks/attention_memory.py

Forward and backward of two rows per device, with the shapes of Stable Diffusion's and SDXL's
UNets: temporary memory, and bytes read and written.
"""

import argparse
import os
import sys

# Before JAX starts, because libtpu would otherwise look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxpref import sharding
from jaxpref.models import kernels

SHAPES = ["4096x8x40", "1024x8x80", "4096x10x64", "1024x20x64"]  # tokens, heads, head size
ROWS = 2  # per device


def main(argv: list[str]) -> None:
  """Compiles each shape with each kernel, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:2x2")
  parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="TOKENSxHEADSxSIZE")
  options = parser.parse_args(argv)
  devices = topologies.get_topology_desc(options.topology, platform="tpu").devices
  mesh = sharding.make_mesh(devices=devices)
  print("| tokens x heads x size | kernel | temporary, MiB | read and written, MiB |")
  print("|---|---|---|---|")
  for text in options.shapes:
    tokens, heads, size = map(int, text.split("x"))
    for kernel in ("xla", "splash"):
      shape = (ROWS * mesh.size, tokens, heads, size)
      array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
      compiled = jax.jit(_gradients(kernel, mesh)).lower(array, array, array).compile()
      temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
      moved = compiled.cost_analysis()["bytes accessed"] / 2**20
      print(f"| {text} | {kernel} | {temporary:,.0f} | {moved:,.0f} |", flush=True)


def _gradients(kernel: str, mesh: jax.sharding.Mesh):
  def loss(query, key, value):
    scale = query.shape[-1] ** -0.5
    out = kernels.dot_product_attention(
      *(query, key, value), scale=scale, kernel=kernel, mesh=mesh
    )
    return jnp.square(out.astype(jnp.float32)).sum()

  return jax.grad(loss, argnums=(0, 1, 2))


if __name__ == "__main__":
  main(sys.argv[1:])
