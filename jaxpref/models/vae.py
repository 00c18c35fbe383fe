"""VAEs as pure functions between images and latents; the module is diffusers' Flax VAE.

The functions take any module with what they use of `AutoencoderKL`: the fields
`latent_channels`, `sample_size` (an image's, in pixels), `scaling_factor` and `shift_factor`,
the property `factor`, and the methods `moments` and `pixels`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL
from diffusers.configuration_utils import flax_register_to_config

from jaxpref.errors import UserError
from jaxpref.models import convolution
from jaxpref.models.unet import module_fields, refuse_unsupported

# Options of PyTorch's class that the Flax module lacks, and the value that it implements.
_SUPPORTED = {
  "act_fn": "silu",
  "mid_block_add_attention": True,
  "latents_mean": None,
  "latents_std": None,
}


@flax_register_to_config
class AutoencoderKL(FlaxAutoencoderKL):
  """diffusers' VAE with fields that its Flax class lacks.

  Attributes:
    shift_factor: subtracted from latents before they are scaled.
    use_quant_conv: whether a 1 x 1 convolution follows the encoder.
    use_post_quant_conv: whether a 1 x 1 convolution precedes the decoder.
  """

  shift_factor: float = 0.0
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True

  @property
  def factor(self) -> int:
    """Pixels per latent along an axis."""
    network: Any = self
    return 2 ** (len(network.block_out_channels) - 1)

  def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes mean and log-variance of the posterior, [B, C, h, w], of [B, 3, H, W]."""
    network: Any = self
    hidden = network.encoder(_channels_last(images))
    if self.use_quant_conv:
      hidden = network.quant_conv(hidden)
    mean, logvar = jnp.split(hidden.transpose(0, 3, 1, 2), 2, axis=1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def pixels(self, latents: jax.Array) -> jax.Array:
    """Decodes unscaled latents [B, C, h, w] to [B, 3, H, W].

    The base class guesses from the last axis whether latents are channels-last, and would
    transpose those that are as wide as they have channels.
    """
    network: Any = self
    hidden = _channels_last(latents)
    if self.use_post_quant_conv:
      hidden = network.post_quant_conv(hidden)
    return network.decoder(hidden).transpose(0, 3, 1, 2)

  def __call__(self, images: jax.Array, deterministic: bool = True) -> jax.Array:
    """Encodes and decodes; `init_weights` calls it, so parameters are those of the methods."""
    del deterministic  # without dropout, all calls are
    return self.pixels(self.moments(images)[0])


def _channels_last(x: jax.Array) -> jax.Array:
  return jnp.transpose(x, (0, 2, 3, 1))


# Known fields of a configuration; others cause a warning. float32 needs no upcast.
FIELDS = frozenset(AutoencoderKL.__dataclass_fields__) | set(_SUPPORTED) | {"force_upcast"}
# Fields without which the defaults build another network than was trained.
NEEDED = (
  *("block_out_channels", "down_block_types", "in_channels", "latent_channels"),
  *("layers_per_block", "out_channels", "up_block_types"),
)


def build_vae(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """Builds the VAE of a diffusers `vae/config.json`, without parameters.

  Raises:
    UserError: the Flax module does not support the configuration.
  """
  refuse_unsupported(config, _SUPPORTED)
  fields = module_fields(AutoencoderKL, config, ("layers_per_block", "sample_size"))
  fields["shift_factor"] = config.get("shift_factor") or 0.0
  return AutoencoderKL(**{**fields, "dtype": dtype})


def check_scale(vae: Any, where: Path) -> None:
  """Checks the scale of a VAE's latents.

  Args:
    vae: the module.
    where: its configuration file, for the error message.

  Raises:
    UserError: it is not a number, or not positive.
  """
  factor, shift = vae.scaling_factor, vae.shift_factor
  if not isinstance(factor, int | float) or not factor > 0:
    raise UserError(f"{where}: scaling_factor must be positive (got {factor})")
  if not isinstance(shift, int | float):
    raise UserError(f"{where}: shift_factor must be a number (got {shift})")


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
    `(mean, logvar)`, each [B, C, h, w], unscaled, log-variance clipped to [-30, 20]; -inf if
    the VAE has no posterior.
  """
  with convolution.fast_in_loops(jax.default_backend()):
    moments: Any = vae.apply({"params": params}, images, method="moments")
  return moments


def encode_posterior(vae: Any, params: Any, images: jax.Array):
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
  vae: Any, params: Any, images: jax.Array, keys: jax.Array | None = None
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
  return _finish(decode_unit(vae, params, latents))


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
def decode_unit(vae: Any, params: Any, latents: jax.Array) -> jax.Array:
  """Decodes scaled latents [B, C, h, w] to images [B, 3, H, W] in about [-1, 1]."""
  z = latents / vae.scaling_factor + vae.shift_factor
  with convolution.fast_in_loops(jax.default_backend()):
    pixels: Any = vae.apply({"params": params}, z, method="pixels")
  return pixels


def decode_clipped(vae: Any, params: Any, latents: jax.Array) -> jax.Array:
  """Decodes scaled latents to pixels that are clipped to [0, 1], but not rounded.

  Args:
    vae: from `build_vae`.
    params: its parameters.
    latents: [B, C, h, w].

  Returns:
    float32 [B, H, W, 3].
  """
  images = decode_unit(vae, params, latents).astype(jnp.float32)
  return jnp.clip(images.transpose(0, 2, 3, 1) * 0.5 + 0.5, 0.0, 1.0)


def decode_tiled(
  vae: Any,
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
  factor = vae.factor
  tile = tile or vae.sample_size // factor
  if max(latents.shape[2:]) <= tile:
    return decode(vae, params, latents)
  step, blend = max(int(tile * (1 - overlap)), 1), int(tile * overlap) * factor
  tops, lefts = (range(0, n, step) for n in latents.shape[2:])
  rows = [
    [decode_unit(vae, params, latents[:, :, i : i + tile, j : j + tile]) for j in lefts]
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
