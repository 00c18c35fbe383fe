"""A reward model of noised latents: the first half of a denoiser, and two projections.

LPO: Zhang et al., 2025, https://arxiv.org/abs/2502.01051. The denoiser already reads noised
latents, levels and prompts, so that its features need neither a decoder nor a clean image. The
reward is the cosine of the projected features and the projected prompt, scaled as in CLIP.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import sharding
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.errors import UserError
from jaxpref.models import unet
from jaxpref.models.denoiser import Cond, Encode
from jaxpref.models.pipeline import Pipeline

# (params, x_t [B, C, h, w], t [B], cond, uncond) -> rewards, float32 [B]. `uncond` is the
# conditioning that guidance leads away from, a tree of [1, ...], or None without guidance.
Score = Callable[[Any, jax.Array, jax.Array, Cond, Any], jax.Array]
_SCALE = math.log(1 / 0.07)  # CLIP's initial logit scale


def check(pipeline: Pipeline) -> None:
  """Refuses models that do not have a first half.

  Raises:
    UserError: the family has none.
  """
  if pipeline.family.make_encode is None:
    raise UserError(
      f"{pipeline.path} is of {pipeline.family.name}: latent reward models are made of the "
      "UNets of Stable Diffusion"
    )


def init_params(pipeline: Pipeline, base: Any, key: jax.Array, *, width: int) -> dict[str, Any]:
  """Makes the parameters of a reward model that begins with a denoiser's own.

  Args:
    pipeline: the modules.
    base: the denoiser's parameters.
    key: for the projections.
    width: of the space in which features and prompts are compared.

  Returns:
    'encoder', 'image' [F, width], 'text' [T, width] and 'logit_scale'.
  """
  encoder, cond = unet.encoder_params(base), pipeline.abstract_cond(1)
  latent = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  level = jax.ShapeDtypeStruct((1,), jnp.int32)
  features = jax.eval_shape(_make_encode(pipeline), encoder, latent, level, cond)
  sizes = {
    "image": sum(of.shape[-1] for of in features),
    "text": jax.eval_shape(pool_text, cond).shape[-1],
  }
  projections = {
    name: jax.random.normal(jax.random.fold_in(key, i), (size, width)) * size**-0.5
    for i, (name, size) in enumerate(sizes.items())
  }
  return {"encoder": encoder, **projections, "logit_scale": jnp.float32(_SCALE)}


def abstract_params(pipeline: Pipeline, *, width: int) -> Any:
  """Returns the shapes of a reward model's parameters, see `init_params`."""
  return jax.eval_shape(
    lambda base: init_params(pipeline, base, jax.random.key(0), width=width),
    pipeline.abstract_denoiser(),
  )


def make_score(pipeline: Pipeline, *, guidance: float, **options: Any) -> Score:
  """Makes the reward of noised latents.

  Args:
    pipeline: the modules.
    guidance: scale by which the features of the last layer are guided; at most 1: they are not.
    **options: those of `Family.make_encode`.

  Returns:
    `score`, see `Score`. The sizes that SDXL is given stay those of the conditioning.
  """
  encode, mesh = _make_encode(pipeline, **options), options.get("mesh")

  def whole(x):
    return x if mesh is None or mesh.shape["fsdp"] == 1 else sharding.gather_params(x, mesh)

  def score(params, x_t, t, cond, uncond):
    features = functools.partial(_pool_features, encode, params["encoder"])
    if guidance > 1:
      uncond = {**uncond, **{name: cond[name] for name in ("time_ids",) if name in cond}}
      without, seen = guidance_lib.without_and_with(features, cond, uncond)(x_t, t)
      guided = without + guidance * (seen - without)
      last = _size_of_last(encode, params["encoder"], x_t, t, cond)
      seen = jnp.concatenate([seen[:, :-last], guided[:, -last:]], axis=1)
    else:
      seen = features(x_t, t, cond)
    image = seen @ whole(params["image"])
    text = pool_text(cond) @ whole(params["text"])
    return jnp.exp(params["logit_scale"]) * _cosine(image, text)

  return score


def pool_text(cond: Cond) -> jax.Array:
  """Returns the pooled text of a conditioning, float32 [B, T]: its own, or the tokens' mean."""
  if "pooled" in cond:
    return cond["pooled"].astype(jnp.float32)
  return cond["text"].mean(axis=1, dtype=jnp.float32)


def _make_encode(pipeline: Pipeline, **options: Any) -> Encode:
  assert pipeline.family.make_encode is not None  # `check` has refused others
  return pipeline.family.make_encode(pipeline.denoiser, **options)


def _pool_features(
  encode: Encode, params: Any, x_t: jax.Array, t: jax.Array, cond: Cond
) -> jax.Array:
  """Returns the mean over the pixels of every feature, float32 [B, F]."""
  found = encode(params, x_t, t, cond)
  return jnp.concatenate([of.mean(axis=(1, 2), dtype=jnp.float32) for of in found], axis=1)


def _size_of_last(encode: Encode, *arguments: Any) -> int:
  return jax.eval_shape(encode, *arguments)[-1].shape[-1]


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  return jnp.sum(unit(a) * unit(b), axis=-1)
