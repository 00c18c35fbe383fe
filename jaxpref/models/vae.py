"""diffusers' Flax VAE as pure functions between images and latents."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL
from diffusers.configuration_utils import flax_register_to_config

from jaxpref.models.unet import module_fields, refuse_unsupported

# Options of PyTorch's class that the Flax module lacks, and the value that it implements.
_SUPPORTED = {
  "act_fn": "silu",
  "mid_block_add_attention": True,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "latents_mean": None,
  "latents_std": None,
}


@flax_register_to_config
class AutoencoderKL(FlaxAutoencoderKL):
  """diffusers' VAE with the field `shift_factor`, which its Flax class lacks."""

  shift_factor: float = 0.0


# Known fields of a configuration; others cause a warning. float32 needs no upcast.
FIELDS = frozenset(AutoencoderKL.__dataclass_fields__) | set(_SUPPORTED) | {"force_upcast"}


def build_vae(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """Builds the VAE of a diffusers `vae/config.json`, without parameters.

  Raises:
    UserError: the Flax module does not support the configuration.
  """
  refuse_unsupported(config, _SUPPORTED)
  fields = module_fields(AutoencoderKL, config, ("layers_per_block", "sample_size"))
  fields["shift_factor"] = config.get("shift_factor") or 0.0
  return AutoencoderKL(**{**fields, "dtype": dtype})


def to_unit(images: jax.Array) -> jax.Array:
  """Converts uint8 [B, H, W, 3] to the VAE's input, float32 [B, 3, H, W] in [-1, 1]."""
  return jnp.transpose(images.astype(jnp.float32) / 127.5 - 1.0, (0, 3, 1, 2))


def to_bytes(images: jax.Array) -> jax.Array:
  """Converts float [B, 3, H, W] in [-1, 1], clipped, to uint8 [B, H, W, 3]."""
  scaled = jnp.clip(jnp.transpose(images, (0, 2, 3, 1)) * 127.5 + 127.5, 0.0, 255.0)
  return jnp.round(scaled).astype(jnp.uint8)


class Decoded(NamedTuple):
  """Decoded images.

  Attributes:
    pixels: uint8 [B, H, W, 3].
    finite: bool [B], whether all values of an image were finite; if not, its pixels are
      meaningless.
  """

  pixels: jax.Array
  finite: jax.Array


def _finish(images: jax.Array) -> Decoded:
  return Decoded(to_bytes(images), jnp.isfinite(images).all(axis=(1, 2, 3)))


def encode_moments(vae: nn.Module, params: Any, images: jax.Array):
  """Computes mean and log-variance of the posterior.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    images: float [B, 3, H, W] in [-1, 1].

  Returns:
    `(mean, logvar)`, each [B, C, h, w], unscaled, log-variance clipped to [-30, 20].
  """
  encoded: Any = vae.apply({"params": params}, images, method=vae.encode)
  posterior = encoded.latent_dist
  # diffusers' Flax posterior is channels-last; all arrays of this package are channels-first.
  to_nchw = (0, 3, 1, 2)
  return jnp.transpose(posterior.mean, to_nchw), jnp.transpose(posterior.logvar, to_nchw)


def encode_posterior(vae: nn.Module, params: Any, images: jax.Array):
  """Encodes images to the posterior of scaled latents.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    images: uint8 [B, H, W, 3].

  Returns:
    `(mode, std)`, each float [B, C, h, w]: shifted and scaled as in `encode`.
  """
  mean, logvar = encode_moments(vae, params, to_unit(images))
  std = jnp.exp(0.5 * logvar) * vae.scaling_factor
  return (mean - vae.shift_factor) * vae.scaling_factor, std


def encode(
  vae: nn.Module, params: Any, images: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
  """Encodes images to the denoiser's latents: (z - shift) scale.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    images: uint8 [B, H, W, 3].
    keys: typed keys [B], one per image, to sample z from the posterior; without them z is the
      posterior's mode.

  Returns:
    float [B, C, h, w].
  """
  z, logvar = encode_moments(vae, params, to_unit(images))
  if keys is not None:
    noise = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:], z.dtype))(keys)
    z = z + jnp.exp(0.5 * logvar) * noise
  return (z - vae.shift_factor) * vae.scaling_factor


def decode(vae: nn.Module, params: Any, latents: jax.Array) -> Decoded:
  """Decodes scaled latents [B, C, h, w]."""
  return _finish(_decode_unit(vae, params, latents))


def decode_sliced(
  vae: nn.Module, params: Any, latents: jax.Array, *, at_once: int = 1
) -> Decoded:
  """Decodes like `decode`, `at_once` images at a time, so memory does not grow with the batch.

  The images of a chunk are B / at_once apart, so with a batch sharded over `at_once` devices,
  every device decodes its own. `at_once` must divide the batch.
  """
  hands = latents.reshape(at_once, -1, *latents.shape[1:]).swapaxes(0, 1)
  decoded = jax.lax.map(lambda z: decode(vae, params, z), hands)
  undealt = lambda x: x.swapaxes(0, 1).reshape(latents.shape[0], *x.shape[2:])  # noqa: E731
  return jax.tree.map(undealt, decoded)


@functools.partial(jax.jit, static_argnums=0)  # otherwise traced again for each tile
def _decode_unit(vae: nn.Module, params: Any, latents: jax.Array) -> jax.Array:
  """Decodes scaled latents [B, C, h, w] to images [B, 3, H, W] in about [-1, 1]."""
  z = latents / vae.scaling_factor + vae.shift_factor
  out: Any = vae.apply({"params": params}, z, method=vae.decode)
  return out.sample


def decode_tiled(
  vae: nn.Module,
  params: Any,
  latents: jax.Array,
  *,
  tile: int | None = None,
  overlap: float = 0.25,
) -> Decoded:
  """Decodes like `decode`, tile by tile, for images that do not fit in the decoder's memory.

  Adjacent tiles overlap and are blended linearly, as in diffusers' tiled VAE. A tile's lack of
  context can show as a faint change of tone.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    latents: [B, C, h, w].
    tile: height and width of a tile in latents; by default the VAE's training size.
    overlap: share of a tile that the next tile decodes, too, from 0 to 0.5.

  Returns:
    Images of 8 h x 8 w pixels, for a VAE that halves the size three times.
  """
  factor = 2 ** (len(vae.block_out_channels) - 1)
  tile = tile or vae.sample_size // factor
  if max(latents.shape[2:]) <= tile:
    return decode(vae, params, latents)
  step, blend = max(int(tile * (1 - overlap)), 1), int(tile * overlap) * factor
  tops, lefts = (range(0, n, step) for n in latents.shape[2:])
  rows = [
    [_decode_unit(vae, params, latents[:, :, i : i + tile, j : j + tile]) for j in lefts]
    for i in tops
  ]
  bands = []
  for i, row in enumerate(rows):
    for j in range(len(row)):
      if i > 0:
        row[j] = _blend(rows[i - 1][j], row[j], blend, axis=2)
      if j > 0:
        row[j] = _blend(row[j - 1], row[j], blend, axis=3)
    shown = [part[:, :, : step * factor, : step * factor] for part in row]
    bands.append(jnp.concatenate(shown, axis=3))
  return _finish(jnp.concatenate(bands, axis=2))


def _blend(before: jax.Array, after: jax.Array, extent: int, *, axis: int) -> jax.Array:
  """Blends the first `extent` entries of `after` along `axis` with the last of `before`."""
  extent = min(extent, before.shape[axis], after.shape[axis])
  if extent == 0:
    return after
  shape = [1] * after.ndim
  shape[axis] = extent
  weight = (jnp.arange(extent) / extent).reshape(shape)
  take = lambda x, start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)  # noqa: E731
  last = take(before, before.shape[axis] - extent, before.shape[axis])
  mixed = last * (1 - weight) + take(after, 0, extent) * weight
  return jnp.concatenate([mixed, take(after, extent, after.shape[axis])], axis=axis)
