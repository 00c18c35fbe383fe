"""Blocks of SANA's autoencoder, see `dc_ae`. Feature maps are channels-last, [B, h, w, C]."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpref.models.dit.layers import dense
from jaxpref.models.dit.sana_blocks import GLUMBConv, RMSNorm, conv, relu_linear_attention

EPSILON = 1e-5  # of all norms
TYPES = ("ResBlock", "EfficientViTBlock")


def unshuffle(x: jax.Array) -> jax.Array:
  """Moves each 2 x 2 pixels into channels: [B, 2h, 2w, C] to [B, h, w, 4C], channel major."""
  b, h, w, c = x.shape
  tiles = x.reshape(b, h // 2, 2, w // 2, 2, c)
  return tiles.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2, w // 2, 4 * c)


def shuffle(x: jax.Array) -> jax.Array:
  """Moves channels into 2 x 2 pixels: the inverse of `unshuffle`."""
  b, h, w, c = x.shape
  tiles = x.reshape(b, h, w, c // 4, 2, 2)
  return tiles.transpose(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4)


def average(x: jax.Array, channels: int) -> jax.Array:
  """Averages consecutive channels, so that `channels` are left."""
  return x.reshape(*x.shape[:-1], channels, -1).mean(axis=-1)


def repeat(x: jax.Array, channels: int) -> jax.Array:
  """Repeats each channel, so that there are `channels`."""
  return jnp.repeat(x, channels // x.shape[-1], axis=-1)


class ResBlock(nn.Module):
  """Two convolutions with a residual connection."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features of the same shape."""
    y = nn.silu(conv(x, x.shape[-1], 3, name="conv1", dtype=self.dtype))
    y = conv(y, x.shape[-1], 3, use_bias=False, name="conv2", dtype=self.dtype)
    return x + RMSNorm(EPSILON, dtype=self.dtype, name="norm")(y)


class MultiscaleProjection(nn.Module):
  """Aggregates neighbouring tokens' queries, keys and values, each head alone.

  Attributes:
    kernel: height and width of the neighbourhood.
    groups: three times the number of heads.
    dtype: of the computation.
  """

  kernel: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, qkv: jax.Array) -> jax.Array:
    """Computes queries, keys and values [B, h, w, 3C] of [B, h, w, 3C]."""
    wide = qkv.shape[-1]
    part = functools.partial(conv, features=wide, use_bias=False, dtype=self.dtype)
    y = part(qkv, size=self.kernel, groups=wide, name="proj_in")
    return part(y, size=1, groups=self.groups, name="proj_out")


class MultiscaleAttention(nn.Module):
  """ReLU linear attention of tokens and of their neighbourhoods.

  Attributes:
    head_dim: channels of a head.
    scales: kernel sizes of the neighbourhoods; each adds as many heads as there are without.
    dtype: of the computation; the attention itself is float32.
  """

  head_dim: int
  scales: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features of the same shape, with a residual connection."""
    b, h, w, c = x.shape
    linear = functools.partial(dense, features=c, use_bias=False, dtype=self.dtype)
    qkv = jnp.concatenate([linear(x, name=f"to_{part}") for part in "qkv"], axis=-1)
    found = [qkv]
    for i, kernel in enumerate(self.scales):
      project = MultiscaleProjection(
        kernel, 3 * c // self.head_dim, self.dtype, name=f"to_qkv_multiscale_{i}"
      )
      found.append(project(qkv))
    # The trained network cuts heads out of runs of 3 x head_dim channels, although q, k and v
    # lie one after the other.
    heads = jnp.concatenate(found, axis=-1).reshape(b, h * w, -1, 3 * self.head_dim)
    y = relu_linear_attention(*jnp.split(heads, 3, axis=-1))
    y = linear(y.reshape(b, h, w, -1).astype(self.dtype), name="to_out")
    return x + RMSNorm(EPSILON, dtype=self.dtype, name="norm_out")(y)


class EfficientViTBlock(nn.Module):
  """Multi-scale attention and a mix feed-forward, each with a residual connection."""

  head_dim: int
  scales: tuple[int, ...]
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features of the same shape."""
    x = MultiscaleAttention(self.head_dim, self.scales, self.dtype, name="attn")(x)
    return x + GLUMBConv(4 * x.shape[-1], norm=True, dtype=self.dtype, name="conv_out")(x)


class DownBlock(nn.Module):
  """Halves height and width."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features [B, h / 2, w / 2, features]."""
    y = conv(x, self.features, 3, strides=2, name="conv", dtype=self.dtype)
    return y + average(unshuffle(x), self.features)


class UpBlock(nn.Module):
  """Doubles height and width."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes features [B, 2h, 2w, features]."""
    larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    y = conv(larger, self.features, 3, name="conv", dtype=self.dtype)
    return y + shuffle(repeat(x, 4 * self.features))


class Stage(nn.Module):
  """The blocks of one size; modules are named by their numbers.

  Attributes:
    block: 'ResBlock' or 'EfficientViTBlock'.
    layers: number of blocks.
    head_dim: of the attention.
    scales: of the attention.
    up_to: number of channels after an `UpBlock` before the blocks; 0 for none.
    down_to: number of channels after a `DownBlock` behind the blocks; 0 for none.
    dtype: of the computation.
  """

  block: str
  layers: int
  head_dim: int
  scales: tuple[int, ...]
  dtype: Any
  up_to: int = 0
  down_to: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the blocks to [B, h, w, C]."""
    first = 0
    if self.up_to:
      x, first = UpBlock(self.up_to, self.dtype, name="0")(x), 1
    for name in map(str, range(first, first + self.layers)):
      if self.block == "ResBlock":
        x = ResBlock(self.dtype, name=name)(x)
      else:
        x = EfficientViTBlock(self.head_dim, self.scales, self.dtype, name=name)(x)
    if self.down_to:
      x = DownBlock(self.down_to, self.dtype, name=str(first + self.layers))(x)
    return x
