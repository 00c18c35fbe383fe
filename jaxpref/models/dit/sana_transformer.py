"""SANA's transformer (Xie et al., 2024, arXiv 2410.10629), versions 1.0 and 1.5.

Attention within the image is linear in the number of tokens. Attention to the text is plain
attention with a mask. Between blocks the image is a grid, [B, h, w, D], as the feed-forward's
convolution needs it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models import kernels
from jaxpref.models.dit import transformer_fields
from jaxpref.models.dit.embeddings import embed_timesteps, position_table
from jaxpref.models.dit.joint_attention import AttentionOptions
from jaxpref.models.dit.layers import TwoLayers, dense, modulate
from jaxpref.models.dit.sana_blocks import GLUMBConv, conv, relu_linear_attention
from jaxpref.models.unet import refuse_unsupported

_MASKED = -10_000.0  # added to the logits of masked tokens, as in training
_ACROSS_HEADS = "rms_norm_across_heads"


class Attention(nn.Module):
  """Attention of the image to itself, or to the text.

  Attributes:
    heads: number of heads.
    head_dim: channels of a head.
    linear: whether it is ReLU linear attention, in float32, instead of softmax attention.
    qk_norm: whether queries and keys are normalized, over all heads together.
    options: how softmax attention is computed.
    dtype: of the computation.
  """

  heads: int
  head_dim: int
  linear: bool
  qk_norm: bool
  options: AttentionOptions
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, source: jax.Array, bias: jax.Array | None = None
  ) -> jax.Array:
    """Computes the attention of tokens [B, N, D] to the tokens of `source` [B, K, D].

    Args:
      x: tokens that attend.
      source: tokens that are attended to.
      bias: added to the logits of softmax attention, [B, 1, 1, K].
    """
    width = self.heads * self.head_dim
    part = functools.partial(dense, features=width, use_bias=not self.linear, dtype=self.dtype)
    norm = functools.partial(nn.RMSNorm, epsilon=1e-5, dtype=self.dtype)
    query, key = part(x, name="to_q"), part(source, name="to_k")
    if self.qk_norm:
      query, key = norm(name="norm_q")(query), norm(name="norm_k")(key)
    query, key, value = (
      y.reshape(*y.shape[:2], self.heads, self.head_dim)
      for y in (query, key, part(source, name="to_v"))
    )
    if self.linear:
      out = relu_linear_attention(query, key, value)
    else:
      scale = self.head_dim**-0.5
      out = kernels.dot_product_attention(
        query, key, value, scale=scale, bias=bias, **self.options._asdict()
      )
    out = out.astype(self.dtype).reshape(*x.shape[:2], width)
    return dense(out, x.shape[-1], name="to_out_0", dtype=self.dtype)


class SanaBlock(nn.Module):
  """A block: linear attention, attention to the text, mix feed-forward.

  Attributes:
    self_heads: number of heads of the linear attention, and channels of a head.
    cross_heads: the same of the attention to the text.
    hidden: channels of the feed-forward.
    qk_norm: see `Attention`.
    options: see `Attention`.
    dtype: of the computation.
  """

  self_heads: tuple[int, int]
  cross_heads: tuple[int, int]
  hidden: int
  qk_norm: bool
  options: AttentionOptions
  dtype: Any

  @nn.compact
  def __call__(
    self, x: jax.Array, text: jax.Array, bias: jax.Array, modulation: jax.Array
  ) -> jax.Array:
    """Computes the image's features [B, h, w, D] of [B, h, w, D].

    Args:
      x: the image's features.
      text: the text's tokens [B, L, D].
      bias: 0 for tokens and a large negative number for padding, [B, 1, 1, L].
      modulation: of the timestep, [B, 6, D]; every block gets the same, and adds its table.
    """
    b, h, w, width = x.shape
    table = self.param("scale_shift_table", nn.initializers.normal(width**-0.5), (6, width))
    vectors = jnp.split((table + modulation)[:, :, None, None], 6, axis=1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (v[:, 0] for v in vectors)
    part = functools.partial(
      Attention, qk_norm=self.qk_norm, options=self.options, dtype=self.dtype
    )
    tokens = modulate(x, shift_a, scale_a).astype(self.dtype).reshape(b, h * w, width)
    found = part(*self.self_heads, linear=True, name="attn1")(tokens, tokens)
    x = (x + gate_a * found.reshape(x.shape)).astype(self.dtype)
    # Without a norm before it and without a gate.
    to_text = part(*self.cross_heads, linear=False, name="attn2")
    x = x + to_text(x.reshape(b, h * w, width), text, bias).reshape(x.shape)
    found = GLUMBConv(self.hidden, dtype=self.dtype, name="ff")(modulate(x, shift_m, scale_m))
    return (x + gate_m * found).astype(self.dtype)


class SanaTransformer(nn.Module):
  """The velocity of latents. Fields and parameters have the names of diffusers' class.

  Attributes:
    in_channels: channels of the latents.
    out_channels: channels of the prediction.
    num_attention_heads: heads of the linear attention.
    attention_head_dim: channels of such a head; all heads together are D.
    num_layers: number of blocks.
    num_cross_attention_heads: heads of the attention to the text.
    cross_attention_head_dim: channels of such a head.
    caption_channels: channels of the text.
    mlp_ratio: channels of the feed-forward by D.
    sample_size: height and width of a latent at the training size.
    interpolation_scale: divides positions, which are embedded and added to the tokens; None for
      a network without an embedding of positions.
    qk_norm: None or 'rms_norm_across_heads'.
    remat: whether blocks are computed again in the backward pass, to save memory.
    options: how softmax attention is computed.
    dtype: of the computation; parameters are float32.
  """

  in_channels: int = 32
  out_channels: int = 32
  num_attention_heads: int = 70
  attention_head_dim: int = 32
  num_layers: int = 20
  num_cross_attention_heads: int = 20
  cross_attention_head_dim: int = 112
  caption_channels: int = 2304
  mlp_ratio: float = 2.5
  sample_size: int = 32
  interpolation_scale: float | None = None
  qk_norm: str | None = None
  remat: bool = False
  options: AttentionOptions = AttentionOptions()
  dtype: Any = jnp.float32

  @property
  def width(self) -> int:
    """D, the number of channels between blocks."""
    return self.num_attention_heads * self.attention_head_dim

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
    """Predicts the velocity of latents.

    Args:
      x: noisy latents [B, C, h, w].
      t: timesteps from 0 to 1000, not necessarily whole, [B].
      text: the text's hidden states [B, L, caption_channels].
      mask: 1 for tokens of the text, 0 for padding, [B, L].

    Returns:
      [B, out_channels, h, w].
    """
    rows, columns = x.shape[2:]
    x = _Patches(self.width, self.dtype, name="patch_embed")(x.transpose(0, 2, 3, 1))
    if self.interpolation_scale is not None:
      base = self.sample_size / self.interpolation_scale
      x += position_table(self.width, rows, columns, base).astype(self.dtype)
    embedding, modulation = _TimeEmbedding(self.width, self.dtype, name="time_embed")(t)
    projection = TwoLayers(
      self.width, activation=nn.gelu, dtype=self.dtype, name="caption_projection"
    )
    text = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, name="caption_norm")(projection(text))
    bias = (1.0 - mask.astype(self.dtype))[:, None, None] * _MASKED
    block = nn.remat(SanaBlock) if self.remat else SanaBlock
    for i in range(self.num_layers):
      x = block(
        (self.num_attention_heads, self.attention_head_dim),
        (self.num_cross_attention_heads, self.cross_attention_head_dim),
        hidden=int(self.mlp_ratio * self.width),
        qk_norm=self.qk_norm == _ACROSS_HEADS,
        options=self.options,
        dtype=self.dtype,
        name=f"transformer_blocks_{i}",
      )(x, text, bias, modulation)
    init = nn.initializers.normal(self.width**-0.5)
    table = self.param("scale_shift_table", init, (2, self.width))
    shift, scale = jnp.split((table + embedding[:, None])[:, :, None, None], 2, axis=1)
    x = modulate(x, shift[:, 0], scale[:, 0])
    out = dense(x, self.out_channels, name="proj_out", dtype=self.dtype)
    return out.transpose(0, 3, 1, 2)

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes random parameters."""
    x = jnp.zeros((1, self.in_channels, 2, 2))
    text = jnp.zeros((1, 2, self.caption_channels))
    return self.init(key, x, jnp.zeros(1), text, jnp.ones((1, 2)))["params"]


class _Patches(nn.Module):
  """Maps latents to tokens, one per latent."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return conv(x, self.features, 1, name="proj", dtype=self.dtype)


class _TimeEmbedding(nn.Module):
  """The embedding of the timestep [B, D], and the blocks' modulation by it [B, 6, D]."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    embedding = _TimestepEmbedder(self.features, self.dtype, name="emb")(t)
    wide = dense(nn.silu(embedding), 6 * self.features, name="linear", dtype=self.dtype)
    return embedding, wide.reshape(len(t), 6, self.features)


class _TimestepEmbedder(nn.Module):
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    layers = TwoLayers(self.features, dtype=self.dtype, name="timestep_embedder")
    return layers(embed_timesteps(t).astype(self.dtype))


# Options of diffusers' class, and the value that the module implements.
_SUPPORTED = {
  "attention_bias": False,
  "dropout": 0.0,
  "guidance_embeds": False,
  "norm_elementwise_affine": False,
  "norm_eps": 1e-6,
  "patch_size": 1,
  "timestep_scale": 1.0,
}
# Known fields of a configuration; others cause a warning.
FIELDS = transformer_fields.of_module(SanaTransformer) | set(_SUPPORTED)
FIELDS |= {"cross_attention_dim", "guidance_embeds_scale"}
# Fields without which the defaults describe another network than was trained.
NEEDED = (
  *("attention_head_dim", "cross_attention_head_dim", "in_channels", "num_attention_heads"),
  *("num_cross_attention_heads", "num_layers", "out_channels", "sample_size"),
)


def build_sana_transformer(config: Mapping[str, Any], *, dtype: Any) -> SanaTransformer:
  """Builds the transformer of a diffusers `transformer/config.json`, without parameters.

  Args:
    config: the file's contents; unknown fields are ignored, as in diffusers.
    dtype: of the computation; parameters are always float32.

  Raises:
    UserError: a field has a value that diffusers' class or this module does not take.
  """
  refuse_unsupported(config, _SUPPORTED)
  module = SanaTransformer(**transformer_fields.read(SanaTransformer, config), dtype=dtype)
  width = module.width
  text_width = config.get("cross_attention_dim", width)
  transformer_fields.require(
    config,
    ("qk_norm", module.qk_norm in (None, _ACROSS_HEADS), f"null or {_ACROSS_HEADS!r}"),
    ("cross_attention_dim", text_width == width, f"{width}, the width of the heads together"),
    ("attention_head_dim", width % 4 == 0, "a multiple of 4"),
  )
  return module
