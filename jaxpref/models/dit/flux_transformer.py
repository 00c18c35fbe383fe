"""The transformer of Flux.1-dev and Flux.1-schnell (Black Forest Labs, 2024).

It is diffusers' `FluxTransformer2DModel`, whose parameters it has by name. Latents are packed
into tokens inside, and timesteps are 1000 sigma as SD3's are; diffusers' class takes tokens and
sigma.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.errors import UserError
from jaxpref.models.dit import transformer_fields
from jaxpref.models.dit.embeddings import TimeTextEmbedding
from jaxpref.models.dit.joint_attention import AttentionOptions, JointAttention
from jaxpref.models.dit.joint_block import JointBlock
from jaxpref.models.dit.layers import Modulation, dense, modulate
from jaxpref.models.dit.rotary import Rotation, image_rotation

_PATCH = 2  # height and width of a token in latents


class SingleBlock(nn.Module):
  """A block of one stream, in which attention and feed-forward are parallel.

  Attributes:
    heads: number of heads.
    head_dim: channels per head.
    options: how attention is computed.
    dtype: of the computation.
  """

  heads: int
  head_dim: int
  options: AttentionOptions = AttentionOptions()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, embedding: jax.Array, rotation: Rotation) -> jax.Array:
    """Maps tokens [B, N, D], modulated by an embedding [B, D]."""
    part = {"dtype": self.dtype}
    shift, scale, gate = Modulation(3, name="norm", **part)(embedding)
    inner = modulate(x, shift, scale)
    attention = JointAttention(
      *(self.heads, self.head_dim),
      qk_norm=True,
      writes_image=False,
      options=self.options,
      name="attn",
      **part,
    )
    hidden = nn.gelu(dense(inner, 4 * x.shape[-1], name="proj_mlp", **part), approximate=True)
    both = jnp.concatenate([attention(inner, None, rotation)[0], hidden], axis=-1)
    return x + gate * dense(both, x.shape[-1], name="proj_out", **part)


class FluxTransformer(nn.Module):
  """The transformer; fields that are not described are those of diffusers' class.

  Attributes:
    sample_size: height and width of a latent at the training size. diffusers' class does not
      have the field; its pipeline's images are of the default here, 1024 pixels.
    patch_size: must be 1: latents are packed into tokens before.
    in_channels: of a token, 4 times those of a latent.
    guidance_embeds: whether the guidance scale is an input.
    axes_dims_rope: channels of a head that the three axes of positions rotate; the first axis
      is 0 in all tokens.
    options: how attention is computed.
    remat: recompute the inside of blocks in the backward pass instead of storing it.
    dtype: of the computation; parameters are float32.
  """

  sample_size: int = 128
  patch_size: int = 1
  in_channels: int = 64
  out_channels: int | None = None
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)
  options: AttentionOptions = AttentionOptions()
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    text: jax.Array,
    pooled: jax.Array,
    guidance: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the velocity.

    Args:
      x: latents [B, C, H, W].
      t: 1000 times the noise level sigma, [B].
      text: embedded prompts [B, L, `joint_attention_dim`].
      pooled: pooled prompts [B, `pooled_projection_dim`].
      guidance: scale of guidance, [B]; needed if and only if `guidance_embeds`.

    Returns:
      [B, C, H, W], in `dtype`.

    Raises:
      UserError: the latents are not of whole tokens.
      ValueError: `guidance` is missing or surplus.
    """
    if (guidance is not None) != self.guidance_embeds:
      raise ValueError(f"guidance_embeds is {self.guidance_embeds}, guidance is {guidance}")
    width = self.num_attention_heads * self.attention_head_dim
    part = {"dtype": self.dtype}
    rows, columns = x.shape[2] // _PATCH, x.shape[3] // _PATCH
    image = dense(pack(x), width, name="x_embedder", **part)
    text = dense(text, width, name="context_embedder", **part)
    embedding = TimeTextEmbedding(width, name="time_text_embed", **part)(
      t, pooled, None if guidance is None else 1000 * guidance.astype(jnp.float32)
    )
    rotation = image_rotation(text.shape[1], rows, columns, self.axes_dims_rope)
    block: dict[str, Any] = {
      "heads": self.num_attention_heads,
      "head_dim": self.attention_head_dim,
      "options": self.options,
      **part,
    }
    double = nn.remat(JointBlock) if self.remat else JointBlock
    single = nn.remat(SingleBlock) if self.remat else SingleBlock
    for i in range(self.num_layers):
      joint = double(qk_norm=True, name=f"transformer_blocks_{i}", **block)
      image, text = joint(image, text, embedding, rotation)
    tokens = jnp.concatenate([text, image], axis=1)
    for i in range(self.num_single_layers):
      alone = single(name=f"single_transformer_blocks_{i}", **block)
      tokens = alone(tokens, embedding, rotation)
    scale, shift = Modulation(2, name="norm_out", **part)(embedding)
    image = modulate(tokens[:, text.shape[1] :], shift, scale)
    out = dense(image, self.out_channels or self.in_channels, name="proj_out", **part)
    return unpack(out, rows)

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes the parameters as PyTorch's class does."""
    x = jnp.zeros((1, self.in_channels // _PATCH**2, _PATCH, _PATCH))
    text = jnp.zeros((1, 1, self.joint_attention_dim))
    pooled = jnp.zeros((1, self.pooled_projection_dim))
    guidance = jnp.zeros(1) if self.guidance_embeds else None
    return self.init(key, x, jnp.zeros(1), text, pooled, guidance)["params"]


def pack(x: jax.Array) -> jax.Array:
  """Packs latents [B, C, H, W] into tokens [B, H W / 4, 4 C], of (channel, row, column).

  Raises:
    UserError: height or width is odd.
  """
  batch, channels, height, width = x.shape
  if height % _PATCH or width % _PATCH:
    raise UserError(
      f"latents of {height} x {width} do not fit the transformer: both must be multiples of "
      f"{_PATCH}"
    )
  patches = x.reshape(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
  return patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * _PATCH**2)


def unpack(tokens: jax.Array, rows: int) -> jax.Array:
  """Unpacks tokens [B, N, 4 C] in `rows` rows into latents [B, C, H, W]."""
  batch, count, _ = tokens.shape
  patches = tokens.reshape(batch, rows, count // rows, -1, _PATCH, _PATCH)
  latents = patches.transpose(0, 3, 1, 4, 2, 5)
  return latents.reshape(batch, -1, rows * _PATCH, count // rows * _PATCH)


# Known fields of a configuration; others cause a warning.
FIELDS = transformer_fields.of_module(FluxTransformer)
# Fields without which the defaults build another network than was trained. The first files lack
# out_channels and axes_dims_rope.
NEEDED = tuple(sorted(FIELDS - {"axes_dims_rope", "out_channels", "sample_size"}))


def build_flux_transformer(config: Mapping[str, Any], *, dtype: Any) -> FluxTransformer:
  """Builds the transformer of a diffusers `transformer/config.json`, without parameters.

  Args:
    config: the file's contents; unknown fields are ignored, as in diffusers.
    dtype: of the computation; parameters are always float32.

  Raises:
    UserError: a field has a value that diffusers' class or this module does not take.
  """
  m = FluxTransformer(**transformer_fields.read(FluxTransformer, config), dtype=dtype)
  axes = m.axes_dims_rope
  transformer_fields.require(
    config,
    ("patch_size", m.patch_size == 1, "1"),
    ("sample_size", m.sample_size % _PATCH == 0, f"a multiple of {_PATCH}"),
    ("in_channels", m.in_channels % _PATCH**2 == 0, f"a multiple of {_PATCH**2}"),
    ("out_channels", m.out_channels in (None, m.in_channels), f"in_channels, {m.in_channels}"),
    (
      "axes_dims_rope",
      len(axes) == 3 and sum(axes) == m.attention_head_dim and not any(d % 2 for d in axes),
      f"three even numbers that add up to attention_head_dim, {m.attention_head_dim}",
    ),
  )
  return m
