"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT and MMDiT-X; Esser et al., 2024).

It is diffusers' `SD3Transformer2DModel`, whose parameters it has by name.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.dit import transformer_fields
from jaxpref.models.dit.embeddings import PatchEmbedding, TimeTextEmbedding
from jaxpref.models.dit.joint_attention import AttentionOptions
from jaxpref.models.dit.joint_block import JointBlock
from jaxpref.models.dit.layers import Modulation, dense, modulate

T5_TOKENS = 256  # the default of diffusers' pipeline, with or without T5


class SD3Transformer(nn.Module):
  """The transformer; fields that are not described are those of diffusers' class.

  Attributes:
    sample_size: height and width of the latents whose positions are whole numbers.
    caption_projection_dim: must be the width, as in all published models.
    pos_embed_max_size: height and width, in patches, of the table of positions.
    dual_attention_layers: blocks whose image also attends to itself alone.
    qk_norm: None or 'rms_norm'.
    t5_tokens: length of T5's part of the text, which comes after CLIP's and is zeros where a
      pipeline does without T5; 0 for a transformer that was trained without this part. The
      file's field is `_t5_tokens`: diffusers' classes ignore names with an underscore, and its
      pipeline has the number as an argument, `max_sequence_length`.
    options: how attention is computed.
    remat: recompute the inside of blocks in the backward pass instead of storing it.
    dtype: of the computation; parameters are float32.
  """

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int | None = 16
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None
  t5_tokens: int = T5_TOKENS
  options: AttentionOptions = AttentionOptions()
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, t: jax.Array, text: jax.Array, pooled: jax.Array
  ) -> jax.Array:
    """Predicts the velocity.

    Args:
      x: latents [B, C, H, W].
      t: 1000 times the noise level sigma, [B].
      text: embedded prompts [B, L, `joint_attention_dim`].
      pooled: pooled prompts [B, `pooled_projection_dim`].

    Returns:
      [B, C, H, W], in `dtype`.

    Raises:
      UserError: the latents are larger than the table of positions, or not of whole patches.
    """
    width = self.num_attention_heads * self.attention_head_dim
    part = {"dtype": self.dtype}
    image = PatchEmbedding(
      width,
      *(self.patch_size, self.pos_embed_max_size, self.sample_size // self.patch_size),
      **{"name": "pos_embed", **part},
    )(x)
    text = dense(text, self.caption_projection_dim, name="context_embedder", **part)
    embedding = TimeTextEmbedding(width, name="time_text_embed", **part)(t, pooled)
    block = nn.remat(JointBlock) if self.remat else JointBlock
    for i in range(self.num_layers):
      image, text = block(
        *(self.num_attention_heads, self.attention_head_dim),
        qk_norm=self.qk_norm is not None,
        dual=i in self.dual_attention_layers,
        last=i == self.num_layers - 1,
        options=self.options,
        name=f"transformer_blocks_{i}",
        **part,
      )(image, text, embedding)
    scale, shift = Modulation(2, name="norm_out", **part)(embedding)
    channels = self.out_channels or self.in_channels
    out = dense(
      modulate(image, shift, scale), self.patch_size**2 * channels, name="proj_out", **part
    )
    return unpatch(out, x.shape[2] // self.patch_size, self.patch_size)

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes the parameters as PyTorch's class does."""
    size = min(self.sample_size, self.patch_size * self.pos_embed_max_size)
    x = jnp.zeros((1, self.in_channels, size, size))
    text = jnp.zeros((1, 1, self.joint_attention_dim))
    pooled = jnp.zeros((1, self.pooled_projection_dim))
    return self.init(key, x, jnp.zeros(1), text, pooled)["params"]


def unpatch(tokens: jax.Array, rows: int, size: int) -> jax.Array:
  """Converts tokens [B, N, size x size x C], row by row, to latents [B, C, H, W]."""
  batch, count, _ = tokens.shape
  patches = tokens.reshape(batch, rows, count // rows, size, size, -1)
  latents = jnp.einsum("nhwpqc->nchpwq", patches)
  return latents.reshape(batch, -1, rows * size, count // rows * size)


# Known fields of a configuration; others cause a warning.
FIELDS = transformer_fields.of_module(SD3Transformer)
# Fields without which the defaults build another network than was trained. The first files of
# SD3-medium lack qk_norm and dual_attention_layers.
NEEDED = tuple(sorted(FIELDS - {"qk_norm", "dual_attention_layers"}))


def build_sd3_transformer(config: Mapping[str, Any], *, dtype: Any) -> SD3Transformer:
  """Builds the transformer of a diffusers `transformer/config.json`, without parameters.

  Args:
    config: the file's contents; unknown fields are ignored, as in diffusers.
    dtype: of the computation; parameters are always float32.

  Raises:
    UserError: a field has a value that diffusers' class or this module does not take.
  """
  fields = transformer_fields.read(SD3Transformer, config)
  m = SD3Transformer(**fields, t5_tokens=config.get("_t5_tokens", T5_TOKENS), dtype=dtype)
  width = m.num_attention_heads * m.attention_head_dim
  transformer_fields.require(
    config,
    ("qk_norm", m.qk_norm in (None, "rms_norm"), "null or 'rms_norm'"),
    ("attention_head_dim", width % 4 == 0, "a multiple of 4"),
    ("caption_projection_dim", m.caption_projection_dim == width, f"{width}, the width"),
    ("out_channels", m.out_channels in (None, m.in_channels), f"in_channels, {m.in_channels}"),
    ("_t5_tokens", m.t5_tokens in (0, T5_TOKENS), f"0 or {T5_TOKENS}"),
    ("sample_size", m.sample_size % m.patch_size == 0, f"a multiple of {m.patch_size}"),
    (
      "dual_attention_layers",
      set(m.dual_attention_layers) <= set(range(m.num_layers)),
      f"indices of {m.num_layers} layers",
    ),
  )
  return m
