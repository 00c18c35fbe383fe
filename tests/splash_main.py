"""Attention's outputs and gradients; for test_kernels.

As a program, how the rows of splash attention are split over four devices: prints relative
errors as JSON.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxpref import sharding
from jaxpref.models import kernels


def results(mesh, kernel, shapes, within=False):
  """Output and gradients, float32."""
  rng = np.random.default_rng(4)
  arguments = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

  def attend(query, key, value):
    scale = query.shape[-1] ** -0.5
    return kernels.dot_product_attention(
      *(query, key, value), scale=scale, kernel=kernel, mesh=mesh
    )

  if within:  # each device has rows of its own along `data`
    specs = {"in_specs": P("data"), "out_specs": P("data"), "axis_names": {"data"}}
    attend = jax.shard_map(attend, mesh=mesh, check_vma=False, **specs)

  def loss(*arguments):
    out = attend(*arguments)
    return jnp.sum(jnp.sin(out)), out

  program = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
  return jax.tree.map(np.asarray, jax.tree.leaves(program(*arguments)))


def main():
  """On four devices, by itself and inside of a train step's part for each of them."""
  mesh = sharding.make_mesh(data=2, fsdp=2)
  shapes = [(4, 1024, 2, 8)] * 3
  want = results(mesh, "xla", shapes)
  rows = []

  def local(query, key, value, *, scale):
    rows.append(len(query))
    return kernels.dot_product_attention(query, key, value, scale=scale, kernel="xla")

  kernels._splash_attention = local
  errors = {}
  for within in (False, True):
    pairs = zip(results(mesh, "splash", shapes, within), want, strict=True)
    errors[within] = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]
  assert set(rows) == {1}, rows
  print(json.dumps(errors))


if __name__ == "__main__":
  main()
