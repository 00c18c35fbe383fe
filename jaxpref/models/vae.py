"""diffusers' Flax VAE as pure functions between images and latents."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL


def build_vae(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """The VAE of a diffusers `vae/config.json`, without parameters."""
  known = FlaxAutoencoderKL.__dataclass_fields__
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
  return FlaxAutoencoderKL(**{**fields, "dtype": dtype})


def to_unit(images: jax.Array) -> jax.Array:
  """Bytes to what the VAE reads: uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
  return jnp.transpose(images.astype(jnp.float32) / 127.5 - 1.0, (0, 3, 1, 2))


def to_bytes(images: jax.Array) -> jax.Array:
  """The inverse of `to_unit`, clipped: float [B, 3, H, W] to uint8 [B, H, W, 3]."""
  scaled = jnp.clip(jnp.transpose(images, (0, 2, 3, 1)) * 127.5 + 127.5, 0.0, 255.0)
  return jnp.round(scaled).astype(jnp.uint8)


def encode_moments(vae: nn.Module, params: Any, images: jax.Array):
  """Mean and log-variance of the posterior.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    images: float [B, 3, H, W] in [-1, 1].

  Returns:
    `(mean, logvar)`, each [B, C, h, w], unscaled, log-variance clipped to [-30, 20].
  """
  encoded: Any = vae.apply({"params": params}, images, method=vae.encode)
  posterior = encoded.latent_dist
  # diffusers' Flax posterior is channels-last, everything of ours channels-first.
  to_nchw = (0, 3, 1, 2)
  return jnp.transpose(posterior.mean, to_nchw), jnp.transpose(posterior.logvar, to_nchw)


def encode(vae: nn.Module, params: Any, images: jax.Array) -> jax.Array:
  """The latents a denoiser sees: the posterior's mode, scaled; uint8 images in."""
  mean, _ = encode_moments(vae, params, to_unit(images))
  return mean * vae.scaling_factor


def decode(vae: nn.Module, params: Any, latents: jax.Array) -> jax.Array:
  """Images of scaled latents: [B, C, h, w] to uint8 [B, H, W, 3]."""
  out: Any = vae.apply({"params": params}, latents / vae.scaling_factor, method=vae.decode)
  return to_bytes(out.sample)
