"""Classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.diffusion.schedule import per_sample

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(
  denoise_with_cond: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  uncond: Any,
  scale: float | jax.Array,
) -> Denoise:
  """A denoiser of (x_t, t) that is pushed from `uncond` towards `cond`.

  `uncond + scale (cond - uncond)`, in float32, from one call of twice the batch. The
  Python number 1 makes a plain conditional call of the batch itself.

  Args:
    denoise_with_cond: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: the same tree for the empty or negative prompt, [B, ...] or [1, ...].
    scale: guidance scale, a number or one for each sample, [B].
  """
  if isinstance(scale, int | float) and scale == 1:
    return lambda x_t, t: denoise_with_cond(x_t, t, cond)

  def both(uncond_leaf, cond_leaf):
    return _interleave(jnp.broadcast_to(uncond_leaf, cond_leaf.shape), cond_leaf)

  conds = jax.tree.map(both, uncond, cond)

  def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    out = denoise_with_cond(_interleave(x_t, x_t), _interleave(t, t), conds)
    out = out.astype(jnp.float32)
    without, with_cond = out[0::2], out[1::2]
    return without + per_sample(jnp.asarray(scale), out) * (with_cond - without)

  return denoise


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
  # Row by row rather than a after b: over a sharded batch both halves of a pair then
  # stay on their device, where a concatenation would move half of the rows.
  return jnp.stack([a, b], axis=1).reshape((-1,) + a.shape[1:])
