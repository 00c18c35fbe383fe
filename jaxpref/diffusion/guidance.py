"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), by text and by image."""

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
  """Returns a denoiser of (x_t, t) with classifier-free guidance.

  It computes `uncond + scale (cond - uncond)` in float32, in one call with twice the batch. A
  scale of at most 1 means no guidance, the plain conditional prediction, as in diffusers. If
  that scale is a Python number, the call has the batch itself, at half the cost.

  Args:
    denoise_with_cond: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: conditioning of the empty or negative prompt, a tree of [B, ...] or [1, ...].
    scale: guidance scale, a number or an array with one per sample, [B].
  """
  if isinstance(scale, int | float) and scale <= 1:
    return lambda x_t, t: denoise_with_cond(x_t, t, cond)

  evaluate = without_and_with(denoise_with_cond, cond, uncond)

  def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    without, with_cond = evaluate(x_t, t)
    scales = per_sample(jnp.maximum(scale, 1.0), without)
    return without + scales * (with_cond - without)

  return denoise


def without_and_with(
  function: Callable[[jax.Array, jax.Array, Any], jax.Array], cond: Any, uncond: Any
) -> Callable[[jax.Array, jax.Array], list[jax.Array]]:
  """Returns a function of (x_t, t) with both results, in one call with twice the batch.

  Args:
    function: (x_t [B, ...], t [B], cond) -> [B, ...].
    cond: conditioning, a pytree of arrays [B, ...].
    uncond: conditioning of the empty or negative prompt, a tree of [B, ...] or [1, ...].

  Returns:
    (x_t, t) -> the results for `uncond` and for `cond`, float32 [B, ...].
  """

  def both(uncond_leaf, cond_leaf):
    return _interleave(jnp.broadcast_to(uncond_leaf, cond_leaf.shape), cond_leaf)

  conds = jax.tree.map(both, uncond, cond)
  return lambda x_t, t: _evaluate(function, x_t, t, conds, 2)


def by_text_and_image(
  denoise_with_cond: Callable[[jax.Array, jax.Array, Any], jax.Array],
  cond: Any,
  uncond: Any,
  image: jax.Array,
  *,
  text_scale: float,
  image_scale: float,
) -> Denoise:
  """Returns a denoiser of (x_t, t) with separate guidance by a text and by an image.

  It computes `e(0, "") + s_I [e(x, "") - e(0, "")] + s_T [e(x, c) - e(x, "")]` in float32, in
  one call with three times the batch. `s_I` sets how closely the output keeps to the image. The
  form is that of Brooks et al. 2023 (https://arxiv.org/abs/2211.09800). The Python numbers 1
  and 1 make a single call with text and image. All other scales are weights in the formula,
  also below 1: with `s_T = 0` the text has no influence, with `s_I = 0` the image alone has
  none.

  Args:
    denoise_with_cond: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
    cond: conditioning of the text, a dict of arrays [B, ...].
    uncond: conditioning of the empty prompt, a dict of arrays [B, ...] or [1, ...].
    image: clean latents x, [B, C, h, w]; the denoiser gets them as `cond["image"]`, and zeros
      where the formula has 0.
    text_scale: s_T.
    image_scale: s_I.
  """
  both = {**cond, "image": image}
  if all(isinstance(s, int | float) and s == 1 for s in (text_scale, image_scale)):
    return lambda x_t, t: denoise_with_cond(x_t, t, both)
  neither = {**uncond, "image": jnp.zeros_like(image)}
  image_only = {**uncond, "image": image}

  def three(*leaves):
    return _interleave(*(jnp.broadcast_to(x, leaves[-1].shape) for x in leaves))

  conds = jax.tree.map(three, neither, image_only, both)

  def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
    plain, with_image, with_both = _evaluate(denoise_with_cond, x_t, t, conds, 3)
    return plain + image_scale * (with_image - plain) + text_scale * (with_both - with_image)

  return denoise


def _evaluate(denoise_with_cond, x_t, t, conds, count) -> list[jax.Array]:
  """Evaluates each row under its `count` conditionings in one call; float32 predictions."""
  out = denoise_with_cond(_interleave(*[x_t] * count), _interleave(*[t] * count), conds)
  return [out[i::count].astype(jnp.float32) for i in range(count)]


def _interleave(*arrays: jax.Array) -> jax.Array:
  # Row by row rather than one array after the other: over a sharded batch all of a row
  # then stays on its device, where a concatenation would move most of the rows.
  return jnp.stack(arrays, axis=1).reshape((-1,) + arrays[0].shape[1:])
