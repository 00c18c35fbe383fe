"""Attention and group normalisation that cost less than the stock modules', to the same result.

What they are put in the place of `jaxpref.models.interceptors` says.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import sharding

_LONG = 1024  # tokens; below, fused kernels gain nothing
_TILES = (512, 256, 128)  # tokens of a tile of splash attention; the largest that divides
_Moments = tuple[jax.Array, jax.Array]


def resolve_attention(kernel: str, platform: str) -> str:
  """What 'auto' is: cuDNN's on GPUs, splash on TPUs, the modules' own on CPUs, else XLA's."""
  if kernel != "auto":
    return kernel
  return {"gpu": "cudnn", "tpu": "splash", "cpu": "stock"}.get(platform, "xla")


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  scale: float,
  kernel: str,
  mesh: Mesh | None = None,
) -> jax.Array:
  """softmax(scale q k^T) v, each head by itself.

  Args:
    query: [B, Q, heads, D].
    key: [B, K, heads, D].
    value: the same.
    scale: of the logits.
    kernel: 'xla', or for long sequences 'cudnn' or 'splash' where they can, else XLA's.
      cuDNN's is for two bytes a number and heads of a size that it has (up to 128 in steps
      of 8); splash attention, JAX's own kernel for TPUs, for sequences that divide into
      tiles.
    mesh: whose devices the rows are split over; without it 'splash' is XLA's.

  Returns:
    [B, Q, heads, D], in the dtype of the query.
  """
  if kernel == "splash" and mesh and has_tiles(query.shape[1]) and has_tiles(key.shape[1]):
    local = functools.partial(_splash_attention, scale=scale)
    if split := _over_rows(local, query.shape[0], mesh):
      return split(query, key, value)
  long = min(query.shape[1], key.shape[1]) >= _LONG
  fits = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
  use: Literal["cudnn", "xla"] = "cudnn" if kernel == "cudnn" and long and fits else "xla"
  return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation=use)


def has_tiles(tokens: int) -> bool:
  """Whether splash attention takes a sequence: a long one that divides into tiles."""
  return tokens >= _LONG and tokens % _TILES[-1] == 0


def _splash_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
  """Attention that holds a tile of logits at a time, on a single device."""
  # Pallas takes long to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # noqa: PLC0415

  q, kv = (next(t for t in _TILES if x.shape[1] % t == 0) for x in (query, key))
  mask = splash.FullMask((query.shape[1], key.shape[1]))
  # Rows are heads like others: each by itself, under the same mask.
  heads = query.shape[0] * query.shape[2]
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv),
    head_shards=1,
    q_seq_shards=1,
  )
  by_head = lambda x: x.swapaxes(1, 2).reshape(heads, x.shape[1], x.shape[3])  # noqa: E731
  out = attend(by_head(query * scale), by_head(key), by_head(value))
  out = out.reshape(query.shape[0], query.shape[2], query.shape[1], -1)
  return out.swapaxes(1, 2).astype(query.dtype)


def _over_rows(local: Callable, rows: int, mesh: Mesh) -> Callable | None:
  """A function of a device's rows as one of all rows: XLA cannot split a Pallas kernel.

  None where the rows do not divide. Inside of `jax.shard_map`, of a device's rows there.
  """
  known = sharding.known_mesh(mesh)
  kinds = dict(zip(known.axis_names, known.axis_types, strict=True))
  axes = tuple(name for name, kind in kinds.items() if kind != AxisType.Manual)
  if not axes:
    return local
  if rows % math.prod(known.shape[name] for name in axes):
    return None
  return jax.shard_map(
    local,
    mesh=known,
    in_specs=P(axes),
    out_specs=P(axes),
    axis_names=set(axes),
    check_vma=False,
  )


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
