"""The block of two streams that SD3 and Flux have (MMDiT; Esser et al., 2024)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.dit.joint_attention import AttentionOptions, JointAttention
from jaxpref.models.dit.layers import FeedForward, Modulation, modulate
from jaxpref.models.dit.rotary import Rotation


class JointBlock(nn.Module):
  """A block of two streams, image and text, that meet in attention.

  Attributes:
    heads: number of heads.
    head_dim: channels per head.
    qk_norm: whether queries and keys are normalized.
    dual: whether the image also attends to itself alone.
    last: whether the text ends here, because only the image is read afterwards.
    options: how attention is computed.
    dtype: of the computation.
  """

  heads: int
  head_dim: int
  qk_norm: bool = False
  dual: bool = False
  last: bool = False
  options: AttentionOptions = AttentionOptions()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    embedding: jax.Array,
    rotation: Rotation | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Maps the tokens of both streams.

    Args:
      image: [B, N, D].
      text: [B, L, D].
      embedding: of the timestep and other conditioning, [B, D].
      rotation: rotary embedding of the positions of all tokens, text before image.

    Returns:
      The tokens of image and text; those of the text are unchanged in the last block.
    """
    part = {"dtype": self.dtype}
    attention = {"options": self.options, "qk_norm": self.qk_norm, **part}
    of_image = Modulation(9 if self.dual else 6, name="norm1", **part)(embedding)
    of_text = Modulation(2 if self.last else 6, name="norm1_context", **part)(embedding)
    # The last block's text has diffusers' AdaLayerNormContinuous, which begins with the scale.
    text_shift, text_scale = (of_text[1], of_text[0]) if self.last else of_text[:2]
    joint = JointAttention(
      self.heads, self.head_dim, writes_text=not self.last, name="attn", **attention
    )
    out, text_out = joint(
      modulate(image, of_image[0], of_image[1]),
      modulate(text, text_shift, text_scale),
      rotation,
    )
    before = image
    image += of_image[2] * out
    if self.dual:
      alone = JointAttention(self.heads, self.head_dim, name="attn2", **attention)
      image += of_image[8] * alone(modulate(before, of_image[6], of_image[7]))[0]
    image += of_image[5] * FeedForward(name="ff", **part)(
      modulate(image, of_image[3], of_image[4])
    )
    if text_out is not None:
      text += of_text[2] * text_out
      text += of_text[5] * FeedForward(name="ff_context", **part)(
        modulate(text, of_text[3], of_text[4])
      )
    return image, text
