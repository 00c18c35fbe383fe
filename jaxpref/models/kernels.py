"""Attention and group normalisation that cost less than the stock modules', to the same result.

What they are put in the place of `jaxpref.models.interceptors` says.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

_LONG = 1024  # tokens; below, cuDNN's kernels gain nothing
_Moments = tuple[jax.Array, jax.Array]


def resolve_attention(kernel: str, platform: str) -> str:
  """What 'auto' is on a platform: cuDNN's on GPUs, the modules' own on CPUs, else XLA's."""
  if kernel != "auto":
    return kernel
  return {"gpu": "cudnn", "cpu": "stock"}.get(platform, "xla")


def dot_product_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, kernel: str
) -> jax.Array:
  """softmax(scale q k^T) v, each head by itself.

  Args:
    query: [B, Q, heads, D].
    key: [B, K, heads, D].
    value: the same.
    scale: of the logits.
    kernel: 'xla', or 'cudnn' where it can: in two bytes a number, with heads of a size
      that it has (up to 128 in steps of 8), for long sequences; else XLA's.

  Returns:
    [B, Q, heads, D], in the dtype of the query.
  """
  long = min(query.shape[1], key.shape[1]) >= _LONG
  fits = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
  use: Literal["cudnn", "xla"] = "cudnn" if kernel == "cudnn" and long and fits else "xla"
  return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation=use)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  groups: int,
  epsilon: float,
  silu: bool,
) -> jax.Array:
  """Group normalisation (Wu and He, 2018), with SiLU after it if asked for.

  Statistics are float32. Of the forward pass only `x` and its moments are kept, whose dtype
  the output has: the stock module's is float32 and keeps several arrays of its size.

  Args:
    x: [B, ..., C].
    scale: float32 [C].
    bias: float32 [C].
    groups: into which the channels are split.
    epsilon: added to the variance.
    silu: whether y sigmoid(y) follows.

  Returns:
    [B, ..., C] in the dtype of `x`.
  """
  return _forward(x, scale, bias, groups, epsilon, silu)[0]


def _forward(x, scale, bias, groups, epsilon, silu):
  wide = _split(x, groups)
  mean = wide.mean((1, 3), keepdims=True)
  variance = jnp.square(wide - mean).mean((1, 3), keepdims=True)
  moments = mean, jax.lax.rsqrt(variance + epsilon)
  y = _normalised(x, moments, groups) * scale + bias
  out = y * jax.nn.sigmoid(y) if silu else y
  return out.reshape(x.shape).astype(x.dtype), (x, scale, bias, moments)


def _backward(groups, epsilon, silu, kept, g):
  del epsilon
  x, scale, bias, moments = kept
  unit = _normalised(x, moments, groups)
  g = g.reshape(unit.shape).astype(jnp.float32)
  if silu:
    y = unit * scale + bias
    gate = jax.nn.sigmoid(y)
    g = g * gate * (1 + y * (1 - gate))
  d_scale, d_bias = jnp.sum(g * unit, (0, 1)), jnp.sum(g, (0, 1))
  # Of x: what changes neither the mean nor the variance of its group.
  inner, unit = _split(g * scale, groups), _split(unit, groups)
  along = jnp.mean(inner * unit, (1, 3), keepdims=True)
  d_x = moments[1] * (inner - inner.mean((1, 3), keepdims=True) - unit * along)
  return d_x.reshape(x.shape).astype(x.dtype), d_scale, d_bias


group_norm.defvjp(_forward, _backward)


def _split(x: jax.Array, groups: int) -> jax.Array:
  """[B, ..., C] to float32 [B, N, groups, C / groups]."""
  return x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)


def _normalised(x: jax.Array, moments: _Moments, groups: int) -> jax.Array:
  """Of mean 0 and variance 1 in each group, float32 [B, N, C]."""
  mean, rstd = moments
  unit = (_split(x, groups) - mean) * rstd
  return unit.reshape(x.shape[0], -1, x.shape[-1])
