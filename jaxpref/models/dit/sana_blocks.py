"""Blocks of both SANA's transformer and its autoencoder (Xie et al., 2024, arXiv 2410.10629).

Feature maps are channels-last, [B, h, w, C].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.dit.layers import uniform

_EPSILON = 1e-15  # added to the sum of the attention's weights


def relu_linear_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Computes attention with weights relu(q) . relu(k), normalized by their sum, in float32.

  The sums over keys are computed once for all queries, so the cost is linear in the number of
  tokens. For few tokens diffusers computes all weights instead; that is the same function.

  Args:
    query: [B, Q, heads, D].
    key: [B, K, heads, D].
    value: [B, K, heads, D].

  Returns:
    float32 [B, Q, heads, D].
  """
  q, k = (jax.nn.relu(x).astype(jnp.float32) for x in (query, key))
  # By default, accelerators would round the sums over keys before the second product.
  full = jax.lax.Precision.HIGHEST
  sums = jnp.einsum("bkhd,bkhe->bhde", k, value.astype(jnp.float32), precision=full)
  total = jnp.einsum("bqhd,bhd->bqh", q, k.sum(axis=1), precision=full)
  weighted = jnp.einsum("bqhd,bhde->bqhe", q, sums, precision=full)
  return weighted / (total[..., None] + _EPSILON)


def conv(
  x: jax.Array,
  features: int,
  size: int,
  *,
  name: str,
  dtype: Any,
  strides: int = 1,
  groups: int = 1,
  use_bias: bool = True,
) -> jax.Array:
  """Applies a convolution that pads as much on both sides; to be called in a compact method.

  Args:
    x: [B, h, w, inputs].
    features: number of output channels.
    size: height and width of the kernel, odd.
    name: of the layer in the module that calls.
    dtype: of the computation.
    strides: step of the kernel along both axes.
    groups: groups of channels that do not see each other.
    use_bias: whether the layer has a bias.
  """
  init = uniform((x.shape[-1] // groups * size**2) ** -0.5)  # PyTorch's, also for biases
  layer = nn.Conv(
    features,
    (size, size),
    strides,
    padding=size // 2,
    feature_group_count=groups,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=init,
    bias_init=init,
    name=name,
  )
  return layer(x)


class RMSNorm(nn.Module):
  """Normalization by the root mean square over channels, with scale and bias.

  Attributes:
    epsilon: added to the mean square.
    dtype: of the result; the computation is float32.
  """

  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes the last axis of [..., C]."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    wide = x.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale + bias).astype(self.dtype)


class GLUMBConv(nn.Module):
  """The mix feed-forward: a gated linear unit with a 3 x 3 depthwise convolution.

  Attributes:
    hidden: number of channels of the gated unit.
    norm: whether the output is normalized, as in the autoencoder.
    dtype: of the computation.
  """

  hidden: int
  norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features [B, h, w, C] of [B, h, w, C], without a residual connection."""
    channels, wide = x.shape[-1], 2 * self.hidden
    y = nn.silu(conv(x, wide, 1, name="conv_inverted", dtype=self.dtype))
    y = conv(y, wide, 3, groups=wide, name="conv_depth", dtype=self.dtype)
    y, gate = jnp.split(y, 2, axis=-1)
    y = y * nn.silu(gate)
    y = conv(y, channels, 1, use_bias=False, name="conv_point", dtype=self.dtype)
    return RMSNorm(1e-5, dtype=self.dtype, name="norm")(y) if self.norm else y
