"""Memory-efficient attention and group norm, numerically equivalent to the stock modules.

`jaxpref.models.interceptors` swaps them in.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import sharding

_LONG = 1024  # tokens; fused kernels are not faster for shorter sequences
_TILES = (512, 256, 128)  # tokens per tile of splash attention; the largest that divides
_Moments = tuple[jax.Array, jax.Array]


def resolve_attention(kernel: str, platform: str) -> str:
  """Resolves 'auto': 'cudnn' on GPUs, 'splash' on TPUs, 'stock' on CPUs, otherwise 'xla'."""
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
  bias: jax.Array | None = None,
) -> jax.Array:
  """Computes softmax(scale q k^T + bias) v for each head.

  Args:
    query: [B, Q, heads, D].
    key: [B, K, heads, D].
    value: [B, K, heads, D].
    scale: factor of the logits.
    kernel: 'xla', 'cudnn' or 'splash'. The last two are for long sequences and fall back to
      XLA. cuDNN needs a dtype of two bytes and a head size of at most 128 that is a multiple
      of 8; for splash attention, JAX's own TPU kernel, sequences are padded to whole tiles.
    mesh: the mesh that the rows are sharded over; without it 'splash' is 'xla'.
    bias: added to the logits, [B or 1, heads or 1, Q or 1, K]; with it every kernel is 'xla'.

  Returns:
    [B, Q, heads, D], in the dtype of the query.
  """
  long = bias is None and is_long(min(query.shape[1], key.shape[1]))
  if kernel == "splash" and mesh and long:
    local = functools.partial(_splash_attention, scale=scale)
    if split := _over_rows(local, query.shape[0], mesh):
      return split(query, key, value)
  fits = query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
  use: Literal["cudnn", "xla"] = "cudnn" if kernel == "cudnn" and long and fits else "xla"
  return jax.nn.dot_product_attention(query, key, value, bias, scale=scale, implementation=use)


def is_long(tokens: int) -> bool:
  """Returns whether a sequence is long enough for fused kernels."""
  return tokens >= _LONG


def _splash_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
  """Computes attention with one tile of logits at a time, on a single device."""
  # Pallas takes long to import, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash  # noqa: PLC0415

  rows, tokens, count, _ = query.shape
  known = key.shape[1]
  query, key, value = (_whole_tiles(x) for x in (query * scale, key, value))
  q, kv = (next(t for t in _TILES if x.shape[1] % t == 0) for x in (query, key))
  mask = splash.FullMask((query.shape[1], key.shape[1]))
  segments = None
  if (tokens, known) != (query.shape[1], key.shape[1]):
    # Padding is a segment of its own: what it attends to is cut off, and nothing attends to it.
    segments = splash.SegmentIds(
      *(jnp.arange(x.shape[1]) >= n for x, n in ((query, tokens), (key, known)))
    )
    segments = jax.tree.map(lambda ids: ids.astype(jnp.int32), segments)
  # The batch is folded into the heads: splash attention treats them independently.
  heads = rows * count
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv),
    head_shards=1,
    q_seq_shards=1,
  )
  by_head = lambda x: x.swapaxes(1, 2).reshape(heads, x.shape[1], x.shape[3])  # noqa: E731
  out = attend(by_head(query), by_head(key), by_head(value), segments)
  out = out.reshape(rows, count, query.shape[1], -1)[:, :, :tokens]
  return out.swapaxes(1, 2).astype(query.dtype)


def _whole_tiles(x: jax.Array) -> jax.Array:
  """Pads [B, N, heads, D] with zeros to a whole number of the smallest tiles that suit N.

  Small tiles are slow, so a sequence that no tile divides is padded to the largest ones.
  """
  tile = _TILES[-1] if x.shape[1] % _TILES[-1] == 0 else _TILES[0]
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0), (0, 0)))


def _over_rows(local: Callable, rows: int, mesh: Mesh) -> Callable | None:
  """Maps a function of one device's rows over the mesh; XLA cannot shard a Pallas kernel.

  Returns None if the rows do not divide by the devices. Inside `jax.shard_map`, where the rows
  are already one device's, returns `local`.
  """
  current = sharding.current_mesh(mesh)
  if not (axes := sharding.auto_axes(current)):
    return local
  if rows % math.prod(current.shape[name] for name in axes):
    return None
  return jax.shard_map(
    local,
    mesh=current,
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
  """Applies group normalization (Wu and He, 2018), and SiLU after it if `silu`.

  Statistics are float32. The forward pass stores only `x` and its moments, and the output has
  the dtype of `x`. The stock module's output is float32, and it stores several arrays of that
  size.

  Args:
    x: [B, ..., C].
    scale: float32 [C].
    bias: float32 [C].
    groups: number of groups of channels.
    epsilon: added to the variance.
    silu: whether to return y sigmoid(y) instead of y.

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
  # Remove the components that would change the mean or the variance of a group.
  inner, unit = _split(g * scale, groups), _split(unit, groups)
  along = jnp.mean(inner * unit, (1, 3), keepdims=True)
  d_x = moments[1] * (inner - inner.mean((1, 3), keepdims=True) - unit * along)
  return d_x.reshape(x.shape).astype(x.dtype), d_scale, d_bias


group_norm.defvjp(_forward, _backward)


def _split(x: jax.Array, groups: int) -> jax.Array:
  """Reshapes [B, ..., C] to float32 [B, N, groups, C / groups]."""
  return x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)


def _normalised(x: jax.Array, moments: _Moments, groups: int) -> jax.Array:
  """Normalizes each group to mean 0 and variance 1, float32 [B, N, C]."""
  mean, rstd = moments
  unit = (_split(x, groups) - mean) * rstd
  return unit.reshape(x.shape[0], -1, x.shape[-1])
