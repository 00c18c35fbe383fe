"""Memory of a run on a device, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import sharding
from jaxpref.models.pipeline import Pipeline


def bytes_on_device(tree: Any, mesh: Any) -> int:
  """Computes the bytes per device of a tree of shapes that is sharded as parameters are."""
  placed = sharding.params_sharding(mesh, tree)
  sizes = jax.tree.map(
    lambda leaf, where: int(np.prod(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize,
    *(tree, placed),
  )
  return sum(jax.tree.leaves(sizes))


def kept_bytes(pipeline: Pipeline, **options: Any) -> int:
  """Computes the bytes that a denoiser's forward pass stores for the backward pass, per latent.

  Args:
    pipeline: its parameters are not needed.
    **options: `attention`, `norm` and `remat` of `Family.make_denoise`.
  """
  params = pipeline.abstract_denoiser()
  denoise = pipeline.make_denoise(**options)
  x_t = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  cond = pipeline.abstract_cond(1)
  if pipeline.is_improver:
    cond |= {"image": x_t}
  residuals = jax.eval_shape(
    lambda p, x, t, c: jax.vjp(lambda p: denoise(p, x, t, c), p)[1],
    *(params, x_t, jax.ShapeDtypeStruct((1,), jnp.int32), cond),
  )
  # Residuals with a parameter's shape are parameters or their casts, which all latents share.
  weights = {leaf.shape for leaf in jax.tree.leaves(params)}
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(residuals)
    if leaf.shape not in weights
  )
