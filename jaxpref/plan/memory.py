"""What a run needs of a device's memory, from shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import sharding
from jaxpref.models import unet as unet_lib
from jaxpref.models.pipeline import Pipeline, abstract_params


def bytes_on_device(tree: Any, mesh: Any) -> int:
  """Bytes of a device that parameters take, or what is placed like them; a tree of shapes."""
  placed = sharding.params_sharding(mesh, tree)
  sizes = jax.tree.map(
    lambda leaf, where: int(np.prod(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize,
    *(tree, placed),
  )
  return sum(jax.tree.leaves(sizes))


def kept_bytes(pipeline: Pipeline, **options: Any) -> int:
  """What the UNet's forward pass keeps of one latent for the backward pass.

  Args:
    pipeline: parameters are not needed.
    **options: `attention`, `norm` and `remat` of `unet.make_denoise`.
  """
  unet = pipeline.modules["unet"]
  params = abstract_params(unet)
  denoise = unet_lib.make_denoise(unet, **options)
  x_t = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  cond = unet_lib.abstract_cond(pipeline.modules, 1)
  if pipeline.is_improver:
    cond |= {"image": x_t}
  residuals = jax.eval_shape(
    lambda p, x, t, c: jax.vjp(lambda p: denoise(p, x, t, c), p)[1],
    *(params, x_t, jax.ShapeDtypeStruct((1,), jnp.int32), cond),
  )
  # Of parameters, and of their casts, there is one for all latents.
  weights = {leaf.shape for leaf in jax.tree.leaves(params)}
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(residuals)
    if leaf.shape not in weights
  )
