"""The encoder of T5 v1.1, which reads the prompts of SD3 and Flux.1, as a flax module.

Parameters have the names of transformers' PyTorch class `T5EncoderModel`, see `torch_layout`.
transformers' Flax class is not used: it needs arguments that JAX has removed, it takes the
softmax in bfloat16, and it takes logarithms of distances on the device, whose rounding could
change a bucket.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import T5Config

from jaxpref.errors import UserError
from jaxpref.models import config_files

# Known fields of a configuration; others cause a warning.
FIELDS = frozenset(T5Config().to_dict()) | {"output_past", "torch_dtype"}
# Fields that have no defaults here.
NEEDED = (
  *("d_ff", "d_kv", "d_model", "feed_forward_proj", "num_heads", "num_layers", "vocab_size"),
)
# Version 1.1's feed-forward network; the first T5's has one matrix less and a ReLU.
_SUPPORTED = {
  "dense_act_fn": "gelu_new",
  "feed_forward_proj": "gated-gelu",
  "is_gated_act": True,
}


@dataclasses.dataclass(frozen=True)
class T5Fields:
  """Fields of a `T5EncoderModel`'s configuration, by transformers' names."""

  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_layers: int
  num_heads: int
  feed_forward_proj: str
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6


class T5Encoder(nn.Module):
  """Maps token ids [B, L] to their last hidden states [B, L, d_model].

  Matrices are parameters in the computation's dtype: the encoder is never trained.

  Attributes:
    config: sizes.
    dtype: of the computation.
  """

  config: T5Fields
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Applies the encoder without a mask; padding is encoded like any token."""
    of = {"dtype": self.dtype, "param_dtype": self.dtype}
    x = nn.Embed(self.config.vocab_size, self.config.d_model, name="shared", **of)(ids)
    return _Stack(self.config, self.dtype, name="encoder")(x)

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes random parameters."""
    return self.init(key, jnp.zeros((1, 8), jnp.int32))["params"]


class _Stack(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x):
    bias = None
    x = x.astype(_wide(self.dtype))
    for i in range(self.config.num_layers):
      x, bias = _Block(self.config, self.dtype, name=f"block_{i}")(x, bias)
    return _norm(self, name="final_layer_norm")(x)


class _Block(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):
    x, bias = _AttentionLayer(self.config, self.dtype, name="layer_0")(x, bias)
    return _FeedForwardLayer(self.config, self.dtype, name="layer_1")(x), bias


class _AttentionLayer(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):
    attention = _Attention(self.config, self.dtype, name="SelfAttention")
    out, bias = attention(_norm(self, name="layer_norm")(x), bias)
    return x + out, bias


class _FeedForwardLayer(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x):
    network = _FeedForward(self.config, self.dtype, name="DenseReluDense")
    return x + network(_norm(self, name="layer_norm")(x))


class _Attention(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):
    """Attends without a scale; returns the sum of heads and the bias by relative position.

    Args:
      x: [B, L, d_model].
      bias: [1, heads, L, L] from the first block, or None in that block, which has the table.
    """
    c = self.config

    def by_head(name):
      y = _dense(c.num_heads * c.d_kv, self.dtype, name=name)(x)
      return y.reshape(*x.shape[:2], c.num_heads, c.d_kv)

    if bias is None:
      count = c.relative_attention_num_buckets
      table = nn.Embed(count, c.num_heads, dtype=self.dtype, name="relative_attention_bias")
      buckets = relative_buckets(x.shape[1], count, c.relative_attention_max_distance)
      bias = table(buckets).transpose(2, 0, 1)[None]
    q, k, v = by_head("q"), by_head("k"), by_head("v")
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0)
    out = out.reshape(*x.shape[:2], -1)
    return _dense(c.d_model, self.dtype, name="o")(out), bias


class _FeedForward(nn.Module):
  config: T5Fields
  dtype: Any

  @nn.compact
  def __call__(self, x):
    gate = _dense(self.config.d_ff, self.dtype, name="wi_0")(x)
    hidden = _dense(self.config.d_ff, self.dtype, name="wi_1")(x)
    product = jax.nn.gelu(gate, approximate=True) * hidden
    return _dense(self.config.d_model, _wide(self.dtype), name="wo")(product)


def _wide(dtype: Any) -> Any:
  """Returns the dtype of the sum of layers: in float16, which it would overflow, float32."""
  return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def _dense(features: int, dtype: Any, *, name: str) -> nn.Dense:
  return nn.Dense(features, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)


def _norm(module: Any, *, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(epsilon=module.config.layer_norm_epsilon, dtype=module.dtype, name=name)


@functools.lru_cache(maxsize=8)
def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each key's position relative to each query's, int32 [L, L].

  Half of the buckets are for keys after the query. Of each half, the first half is for one
  distance each; the others grow by a constant factor up to `max_distance`, and the last is for
  all larger distances (arXiv 1910.10683). Logarithms are in float32, as in training.
  """
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]
  distance, half = np.abs(offset), num_buckets // 2
  exact = half // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact)
  factor = np.float32(np.log(max_distance / exact))
  far = exact + (ratio / factor * np.float32(half - exact)).astype(np.int32)
  near = np.where(distance < exact, distance, np.minimum(far, half - 1))
  return (near + half * (offset > 0)).astype(np.int32)


def build_t5(config: Mapping[str, Any], *, dtype: Any) -> T5Encoder:
  """Builds the encoder of a `T5EncoderModel`'s `config.json`, without parameters.

  Args:
    config: the file's contents.
    dtype: of the computation and of matrices; in float16 the last matrix of each feed-forward
      network, whose result would overflow, is in float32.

  Raises:
    UserError: a field is missing or not supported; the message names it.
  """
  fields = config_files.make_record(T5Fields, config, _SUPPORTED)
  exact = fields.relative_attention_num_buckets // 4
  if not 0 < exact < fields.relative_attention_max_distance:
    raise UserError(
      "relative_attention_num_buckets must be at least 4, and relative_attention_max_distance "
      f"above a fourth of it (got {fields.relative_attention_num_buckets} and "
      f"{fields.relative_attention_max_distance})"
    )
  return T5Encoder(fields, dtype)


def encode(module: T5Encoder, params: Any, ids: jax.Array) -> jax.Array:
  """Computes the last hidden states [B, L, D] of token ids [B, L].

  As in diffusers' pipelines, padding is not masked: it is encoded like any token.
  """
  out: Any = module.apply({"params": params}, ids)
  return out
