"""Classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598; and by an image as well."""

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

  `uncond + scale (cond - uncond)`, in float32, from one call of twice the batch. A scale of at
  most 1 means no guidance, the plain conditional prediction, as in diffusers; a Python number
  then makes one call of the batch itself, at half the cost.

  Args:
    denoise_with_cond: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: the same tree for the empty or negative prompt, [B, ...] or [1, ...].
    scale: guidance scale, a number or one for each sample, [B].
  """
  if isinstance(scale, int | float) and scale <= 1:
    return lambda x_t, t: denoise_with_cond(x_t, t, cond)

  def both(uncond_leaf, cond_leaf):
    return _interleave(jnp.broadcast_to(uncond_leaf, cond_leaf.shape), cond_leaf)

  conds = jax.tree.map(both, uncond, cond)

  def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    without, with_cond = _evaluate(denoise_with_cond, x_t, t, conds, 2)
    scales = per_sample(jnp.maximum(scale, 1.0), without)
    return without + scales * (with_cond - without)

  return denoise


def by_text_and_image(
  denoise_with_cond: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  uncond: Any,
  image: jax.Array,
  *,
  text_scale: float,
  image_scale: float,
) -> Denoise:
  """A denoiser of (x_t, t) that is pushed towards a text and, apart from it, an image.

  `e(0, "") + s_I [e(x, "") - e(0, "")] + s_T [e(x, c) - e(x, "")]`, in float32, from one
  call of three times the batch; `s_I` says how closely to keep to the image. The Python
  numbers 1 and 1 make a plain call with both. The form is that of Brooks et al. 2023
  (https://arxiv.org/abs/2211.09800). Other scales are the formula's weights, also below 1:
  with `s_T = 0` the text has no influence, with `s_I = 0` the image alone has none.

  Args:
    denoise_with_cond: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
    cond: of the text, a dict of arrays [B, ...].
    uncond: the same for the empty prompt, [B, ...] or [1, ...].
    image: clean latents x, [B, C, h, w]; joins `cond` as 'image', zeros for none.
    text_scale: s_T.
    image_scale: s_I.
  """
  told = {**cond, "image": image}
  if all(isinstance(s, int | float) and s == 1 for s in (text_scale, image_scale)):
    return lambda x_t, t: denoise_with_cond(x_t, t, told)
  blank = {**uncond, "image": jnp.zeros_like(image)}
  shown = {**uncond, "image": image}

  def three(*leaves):
    return _interleave(*(jnp.broadcast_to(x, leaves[-1].shape) for x in leaves))

  conds = jax.tree.map(three, blank, shown, told)

  def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    neither, with_image, with_both = _evaluate(denoise_with_cond, x_t, t, conds, 3)
    return (
      neither + image_scale * (with_image - neither) + text_scale * (with_both - with_image)
    )

  return denoise


def _evaluate(denoise_with_cond, x_t, t, conds, count) -> list[jax.Array]:
  """The predictions for each of a row's `count` conditionings, float32, from one call."""
  out = denoise_with_cond(_interleave(*[x_t] * count), _interleave(*[t] * count), conds)
  return [out[i::count].astype(jnp.float32) for i in range(count)]


def _interleave(*arrays: jax.Array) -> jax.Array:
  # Row by row rather than one array after the other: over a sharded batch all of a row
  # then stays on its device, where a concatenation would move most of the rows.
  return jnp.stack(arrays, axis=1).reshape((-1,) + arrays[0].shape[1:])
