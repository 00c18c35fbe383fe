"""SANA's autoencoder, DC-AE (Chen et al., 2024, arXiv 2410.10733).

Published for SANA is f32c32: it halves the size five times, to latents of 32 channels. It does
not have a posterior: an image has one latent. `vae` encodes and decodes images with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.models import config_files
from jaxpref.models import dc_ae_blocks as blocks
from jaxpref.models.dit.sana_blocks import RMSNorm, conv
from jaxpref.models.unet import module_fields, refuse_unsupported

# Options of diffusers' class, and the value that the module implements.
_SUPPORTED = {
  "decoder_act_fns": "silu",
  "decoder_conv_act_fn": "relu",
  "decoder_in_shortcut": True,
  "decoder_norm_types": "rms_norm",
  "downsample_block_type": "Conv",
  "encoder_out_shortcut": True,
  "upsample_block_type": "interpolate",
}
# What diffusers' class takes for missing fields, if that is not the value above.
_UNSAID = {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}


@dataclasses.dataclass(frozen=True)
class Half:
  """Sizes of the encoder or the decoder, one value for each size of the feature maps.

  Attributes:
    widths: channels, from the largest feature maps to the smallest.
    blocks: types of the blocks.
    layers: number of blocks.
    scales: kernel sizes of the attention's neighbourhoods.
  """

  widths: tuple[int, ...]
  blocks: tuple[str, ...]
  layers: tuple[int, ...]
  scales: tuple[tuple[int, ...], ...]


class Encoder(nn.Module):
  """The encoder, see `AutoencoderDC`."""

  half: Half
  latent_channels: int
  head_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Encodes images [B, H, W, 3] to latents [B, h, w, C]."""
    of = self.half
    x = conv(x, of.widths[0], 3, name="conv_in", dtype=self.dtype)
    for i, next_width in enumerate((*of.widths[1:], 0)):
      stage = blocks.Stage(
        *(of.blocks[i], of.layers[i], self.head_dim, of.scales[i], self.dtype),
        down_to=next_width,
        name=f"down_blocks_{i}",
      )
      x = stage(x)
    out = conv(x, self.latent_channels, 3, name="conv_out", dtype=self.dtype)
    return out + blocks.average(x, self.latent_channels)


class Decoder(nn.Module):
  """The decoder, see `AutoencoderDC`."""

  half: Half
  channels: int
  head_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Decodes latents [B, h, w, C] to images [B, H, W, channels]."""
    of, last = self.half, len(self.half.widths) - 1
    x = conv(z, of.widths[-1], 3, name="conv_in", dtype=self.dtype) + blocks.repeat(
      z, of.widths[-1]
    )
    for i in range(last, -1, -1):
      stage = blocks.Stage(
        *(of.blocks[i], of.layers[i], self.head_dim, of.scales[i], self.dtype),
        up_to=of.widths[i] if i < last else 0,
        name=f"up_blocks_{i}",
      )
      x = stage(x)
    x = nn.relu(RMSNorm(blocks.EPSILON, dtype=self.dtype, name="norm_out")(x))
    return conv(x, self.channels, 3, name="conv_out", dtype=self.dtype)


class AutoencoderDC(nn.Module):
  """The autoencoder, between images [B, 3, H, W] in [-1, 1] and unscaled latents [B, C, h, w].

  Attributes:
    encoder_sizes: of the encoder.
    decoder_sizes: of the decoder.
    in_channels: channels of an image.
    latent_channels: channels of a latent.
    attention_head_dim: channels of a head.
    scaling_factor: the denoiser's latents are the encoder's, times this.
    dtype: of the computation; parameters are float32.
  """

  encoder_sizes: Half
  decoder_sizes: Half
  in_channels: int = 3
  latent_channels: int = 32
  attention_head_dim: int = 32
  scaling_factor: float = 1.0
  dtype: Any = jnp.float32

  # Not fields: latents are not shifted, and tiles for decoding are as large as in diffusers.
  shift_factor = 0.0
  sample_size = 512

  @property
  def factor(self) -> int:
    """Pixels per latent along an axis."""
    return 2 ** (len(self.encoder_sizes.widths) - 1)

  def setup(self):
    """Makes the two halves."""
    common = self.attention_head_dim, self.dtype
    self.encoder = Encoder(self.encoder_sizes, self.latent_channels, *common)
    self.decoder = Decoder(self.decoder_sizes, self.in_channels, *common)

  def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes images [B, 3, H, W] to latents [B, C, h, w], and -inf for their log-variance."""
    latents = self.encoder(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return latents, jnp.full_like(latents, -jnp.inf)

  def pixels(self, latents: jax.Array) -> jax.Array:
    """Decodes unscaled latents [B, C, h, w] to [B, 3, H, W]."""
    return self.decoder(latents.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Decodes the images' latents."""
    return self.pixels(self.moments(images)[0])

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes random parameters."""
    return self.init(key, jnp.zeros((1, self.in_channels, self.factor, self.factor)))["params"]


# Lists of a configuration with one value for each size, and what diffusers takes if one is
# missing; `encoder_` or `decoder_` stands before the name.
_LISTS: dict[str, Any] = {
  "block_out_channels": (128, 256, 512, 512, 1024, 1024),
  "block_types": "ResBlock",
  "layers_per_block": (2, 2, 2, 3, 3, 3),
  "qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
}
_HALVES = ("encoder", "decoder")
_NUMBERS = ("attention_head_dim", "in_channels", "latent_channels", "scaling_factor")
# Known fields of a configuration; others cause a warning.
FIELDS = frozenset(f"{half}_{name}" for half in _HALVES for name in _LISTS)
FIELDS |= {*_NUMBERS, *_SUPPORTED}
# Fields without which the defaults describe another network than was trained.
NEEDED = (
  *("decoder_block_out_channels", "decoder_block_types", "downsample_block_type"),
  *("encoder_block_out_channels", "encoder_block_types", "latent_channels"),
  *("scaling_factor", "upsample_block_type"),
)


def build_dc_ae(config: Mapping[str, Any], *, dtype: Any) -> AutoencoderDC:
  """Builds the autoencoder of a diffusers `vae/config.json`, without parameters.

  Args:
    config: the file's contents; unknown fields are ignored.
    dtype: of the computation; parameters are always float32.

  Raises:
    UserError: the module does not support the configuration.
  """
  refuse_unsupported(_UNSAID | {k: _only(v) for k, v in config.items()}, _SUPPORTED)
  numbers = {name: config[name] for name in _NUMBERS if name in config}
  encoder, decoder = (_read_half(config, half) for half in _HALVES)
  module = AutoencoderDC(encoder, decoder, dtype=dtype, **module_fields(AutoencoderDC, numbers))
  if len(encoder.widths) != len(decoder.widths):
    raise UserError(
      "encoder_block_out_channels and decoder_block_out_channels must be equally long (got "
      f"{len(encoder.widths)} and {len(decoder.widths)})"
    )
  for half, sizes in zip(_HALVES, (encoder, decoder), strict=True):
    _check_widths(module, half, sizes)
  return module


def _only(value: Any) -> Any:
  """Returns the value that a list repeats; other values and lists unchanged."""
  same = isinstance(value, list) and value and all(v == value[0] for v in value)
  return value[0] if same else value


def _read_half(config: Mapping[str, Any], half: str) -> Half:
  default = _LISTS | ({"layers_per_block": (3,) * 6} if half == "decoder" else {})
  name = {field: f"{half}_{field}" for field in _LISTS}
  given = {field: config.get(name[field], default[field]) for field in _LISTS}
  widths, types = given["block_out_channels"], given["block_types"]
  if isinstance(types, str):
    given["block_types"] = types = (types,) * len(widths)
  for field, values in given.items():
    if not isinstance(values, list | tuple) or len(values) != len(widths) or not values:
      raise UserError(
        f"{name[field]} must be a list of the length of {name['block_out_channels']} "
        f"(got {config_files.brief(values)})"
      )
  for field in ("block_out_channels", "layers_per_block"):
    if any(type(n) is not int or n < 1 for n in given[field]):
      raise UserError(
        f"{name[field]} must be positive whole numbers (got {config_files.brief(given[field])})"
      )
  if odd := [t for t in types if t not in blocks.TYPES]:
    raise UserError(
      f"{name['block_types']}: {config_files.brief(odd[0])} is not one of "
      f"{', '.join(blocks.TYPES)}"
    )
  scales = given["qkv_multiscales"]
  if any(type(n) is not int or n < 1 or n % 2 == 0 for kernels in scales for n in kernels):
    raise UserError(
      f"{name['qkv_multiscales']} must be lists of odd sizes (got {config_files.brief(scales)})"
    )
  return Half(*map(tuple, (widths, types, given["layers_per_block"], map(tuple, scales))))


def _check_widths(module: AutoencoderDC, half: str, sizes: Half) -> None:
  """Checks that channels can be cut into heads, and averaged or repeated along shortcuts."""
  head, latent, widths = module.attention_head_dim, module.latent_channels, sizes.widths
  pairs = list(zip(widths, widths[1:], strict=False))
  problems = [
    *(f"4 x {a} by {b}" for a, b in pairs if 4 * a % b),
    *([f"{widths[-1]} by latent_channels {latent}"] if widths[-1] % latent else []),
    *(
      f"{width} by attention_head_dim {head}"
      for width, kind in zip(widths, sizes.blocks, strict=True)
      if kind == "EfficientViTBlock" and width % head
    ),
  ]
  if problems:
    raise UserError(f"{half}_block_out_channels: cannot divide {problems[0]}")
