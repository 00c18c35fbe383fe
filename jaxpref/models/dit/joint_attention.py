"""Attention over the tokens of text and image together (MMDiT; Esser et al., 2024)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpref.models import kernels
from jaxpref.models.dit.layers import dense
from jaxpref.models.dit.rotary import Rotation, rotate


class AttentionOptions(NamedTuple):
  """How attention is computed; it does not change what is computed.

  Attributes:
    kernel: see `kernels.dot_product_attention`.
    mesh: the mesh that rows are sharded over, which kernels that XLA cannot shard need.
  """

  kernel: str = "xla"
  mesh: Mesh | None = None


class JointAttention(nn.Module):
  """Attention in which text and image have their own projections and see each other.

  Without text it is plain self-attention. Parameters have the names of diffusers' `Attention`.

  Attributes:
    heads: number of heads.
    head_dim: channels per head.
    qk_norm: whether queries and keys are divided by their root mean square, per head.
    writes_image: whether the image's output has a projection, `to_out.0`.
    writes_text: whether the text's output has a projection, `to_add_out`, and is returned.
    options: how attention is computed.
    dtype: of the computation; the softmax is float32.
  """

  heads: int
  head_dim: int
  qk_norm: bool = False
  writes_image: bool = True
  writes_text: bool = True
  options: AttentionOptions = AttentionOptions()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, image: jax.Array, text: jax.Array | None = None, rotation: Rotation | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Computes attention.

    Args:
      image: the image's tokens [B, N, D], normalized.
      text: the text's tokens [B, L, D], normalized.
      rotation: rotary embedding of the positions of all tokens, text before image.

    Returns:
      The outputs for the image [B, N, D] and for the text [B, L, D], or None for the text.
    """
    query, key, value = self._heads(image, ("to_q", "to_k", "to_v"), "norm_q", "norm_k")
    if text is not None:
      names = ("add_q_proj", "add_k_proj", "add_v_proj")
      of_text = self._heads(text, names, "norm_added_q", "norm_added_k")
      # The order of tokens does not matter to attention, but must be that of `rotation`.
      query, key, value = (
        jnp.concatenate(pair, axis=1) for pair in zip(of_text, (query, key, value), strict=True)
      )
    if rotation is not None:
      query, key = rotate(query, rotation), rotate(key, rotation)
    out = kernels.dot_product_attention(
      *(query, key, value), scale=self.head_dim**-0.5, **self.options._asdict()
    )
    out = out.reshape(*out.shape[:2], -1)
    length = 0 if text is None else text.shape[1]
    text_out, out = out[:, :length], out[:, length:]
    if self.writes_image:
      out = dense(out, image.shape[-1], name="to_out_0", dtype=self.dtype)
    if text is None or not self.writes_text:
      return out, None
    return out, dense(text_out, text.shape[-1], name="to_add_out", dtype=self.dtype)

  def _heads(
    self, x: jax.Array, names: tuple[str, str, str], query_norm: str, key_norm: str
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, keys and values, each [B, N, heads, head_dim]."""
    width = self.heads * self.head_dim
    query, key, value = (
      dense(x, width, name=name, dtype=self.dtype).reshape(
        *x.shape[:2], self.heads, self.head_dim
      )
      for name in names
    )
    if self.qk_norm:
      query = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=query_norm)(query)
      key = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=key_norm)(key)
    return query, key, value
