"""Layers that diffusion transformers share: linear, adaptive layer norms, feed-forward.

Parameters have the names of diffusers' PyTorch modules, see `torch_layout`, and are initialized
as PyTorch initializes them. They are float32; layers compute in their `dtype`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def uniform(bound: float) -> Callable[..., jax.Array]:
  """Returns an initializer that samples uniformly from -`bound` to `bound`."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(
  x: jax.Array, features: int, *, name: str, dtype: Any, use_bias: bool = True
) -> jax.Array:
  """Applies a linear layer; to be called in a compact method.

  Args:
    x: [..., inputs].
    features: size of the output's last axis.
    name: of the layer in the module that calls.
    dtype: of the computation.
    use_bias: whether the layer has a bias.
  """
  init = uniform(x.shape[-1] ** -0.5)  # PyTorch's, of weights and of biases
  layer = nn.Dense(
    features, use_bias=use_bias, dtype=dtype, kernel_init=init, bias_init=init, name=name
  )
  return layer(x)


def layer_norm(x: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
  """Normalizes the last axis to mean 0 and variance 1, in float32; keeps the dtype."""
  wide = x.astype(jnp.float32)
  wide = wide - wide.mean(-1, keepdims=True)
  rstd = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
  return (wide * rstd).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Computes LN(x) (1 + scale) + shift, the adaptive layer norm."""
  return layer_norm(x) * (1 + scale) + shift


class Modulation(nn.Module):
  """Maps the conditioning's embedding to the vectors of an adaptive layer norm.

  In diffusers these are AdaLayerNormZero (6 vectors: shift, scale and gate of attention, then
  shift, scale and gate of the feed-forward), SD35AdaLayerNormZeroX (9), AdaLayerNormZeroSingle
  (3) and AdaLayerNormContinuous (2: scale, then shift).

  Attributes:
    chunks: number of vectors.
    dtype: of the computation.
  """

  chunks: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, embedding: jax.Array) -> list[jax.Array]:
    """Maps [B, D] to `chunks` arrays [B, 1, D], in the file's order."""
    width = self.chunks * embedding.shape[-1]
    out = dense(nn.silu(embedding), width, name="linear", dtype=self.dtype)
    return jnp.split(out[:, None], self.chunks, axis=-1)


class TwoLayers(nn.Module):
  """Two linear layers with an activation between, `linear_1` and `linear_2`.

  Attributes:
    features: size of the hidden and the output axis.
    activation: between the layers.
    dtype: of the computation.
  """

  features: int
  activation: Callable[[jax.Array], jax.Array] = nn.silu
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., inputs] to [..., features]."""
    hidden = dense(x, self.features, name="linear_1", dtype=self.dtype)
    return dense(self.activation(hidden), self.features, name="linear_2", dtype=self.dtype)


class FeedForward(nn.Module):
  """A layer to four times the width, GELU in tanh's approximation, and a layer back.

  Attributes:
    dtype: of the computation.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    hidden = _Projection(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
    hidden = nn.gelu(hidden, approximate=True)
    return dense(hidden, x.shape[-1], name="net_2", dtype=self.dtype)


class _Projection(nn.Module):
  """A linear layer by the name `proj`, inside the activation's module as in diffusers."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return dense(x, self.features, name="proj", dtype=self.dtype)
