"""Gemma 2 without its head, which reads the prompts of SANA, as a flax module.

Parameters have the names of transformers' PyTorch class `Gemma2Model`, see `torch_layout`.
transformers has a Flax class only of the first Gemma.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import Gemma2Config

from jaxpref.errors import UserError
from jaxpref.models import config_files

# Known fields of a configuration; others cause a warning.
FIELDS = frozenset(Gemma2Config().to_dict()) | {"cache_implementation", "torch_dtype"}
# Fields that have no defaults here.
NEEDED = (
  *("head_dim", "hidden_size", "intermediate_size", "num_attention_heads"),
  *("num_hidden_layers", "num_key_value_heads", "query_pre_attn_scalar", "sliding_window"),
  "vocab_size",
)
_SUPPORTED = {
  "attention_bias": False,
  "hidden_activation": "gelu_pytorch_tanh",
  "rope_scaling": None,
  "use_bidirectional_attention": None,
}


@dataclasses.dataclass(frozen=True)
class GemmaFields:
  """Fields of a `Gemma2Model`'s configuration, by transformers' names."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  query_pre_attn_scalar: int
  sliding_window: int
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  attn_logit_softcapping: float | None = 50.0


class Gemma2(nn.Module):
  """Maps token ids [B, L] to their last hidden states [B, L, hidden_size].

  Matrices are parameters in the computation's dtype: the network is never trained.

  Attributes:
    config: sizes.
    dtype: of the computation.
    soft_cap: whether attention's logits are capped.
  """

  config: GemmaFields
  dtype: Any = jnp.float32
  soft_cap: bool = False

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Applies the network to ids and a mask [B, L] of the tokens that are not padding."""
    c = self.config
    embed = nn.Embed(
      *(c.vocab_size, c.hidden_size),
      **{"dtype": self.dtype, "param_dtype": self.dtype, "name": "embed_tokens"},
    )
    # The factor is rounded to this dtype, as in training.
    x = embed(ids) * jnp.asarray(c.hidden_size**0.5, self.dtype)
    masks = attention_masks(mask, c.sliding_window)
    for i in range(c.num_hidden_layers):
      layer = _Layer(c, self.dtype, self.soft_cap, name=f"layers_{i}")
      x = layer(x, masks["sliding" if i % 2 == 0 else "full"])
    return _Norm(c.rms_norm_eps, name="norm")(x)

  def init_weights(self, key: jax.Array) -> Any:
    """Initializes random parameters."""
    ids = jnp.zeros((1, 8), jnp.int32)
    return self.init(key, ids, ids)["params"]


def attention_masks(mask: jax.Array, window: int) -> dict[str, jax.Array]:
  """Returns which keys each query attends to, bool [B, 1, L, L], by kind of layer.

  Args:
    mask: of the tokens that are not padding, [B, L].
    window: number of last keys, with the query's own, in 'sliding' layers.
  """
  distance = np.arange(mask.shape[1])[:, None] - np.arange(mask.shape[1])[None, :]
  keys = mask.astype(bool)[:, None, None, :]
  full = keys & (distance >= 0)
  return {"full": full, "sliding": full & (distance < window)}


class _Norm(nn.Module):
  epsilon: float

  @nn.compact
  def __call__(self, x):
    """Normalizes in float32; the parameter is the scale's difference from 1."""
    weight = self.param("weight", nn.initializers.zeros, (x.shape[-1],))
    normalized = nn.RMSNorm(epsilon=self.epsilon, use_scale=False, dtype=jnp.float32)(x)
    return (normalized * (1.0 + weight)).astype(x.dtype)


class _Layer(nn.Module):
  config: GemmaFields
  dtype: Any
  soft_cap: bool

  @nn.compact
  def __call__(self, x, mask):
    norm = lambda name: _Norm(self.config.rms_norm_eps, name=name)  # noqa: E731
    attention = _Attention(self.config, self.dtype, self.soft_cap, name="self_attn")
    out = attention(norm("input_layernorm")(x), mask)
    x = x + norm("post_attention_layernorm")(out)
    out = _Mlp(self.config, self.dtype, name="mlp")(norm("pre_feedforward_layernorm")(x))
    return x + norm("post_feedforward_layernorm")(out)


class _Attention(nn.Module):
  config: GemmaFields
  dtype: Any
  soft_cap: bool

  @nn.compact
  def __call__(self, x, mask):
    """Attends with each key-value head for a group of query heads."""
    c = self.config

    def by_head(name, heads):
      y = _dense(heads * c.head_dim, self.dtype, name=name)(x)
      return y.reshape(*x.shape[:2], heads, c.head_dim)

    q = rotate(by_head("q_proj", c.num_attention_heads), c.rope_theta)
    k = rotate(by_head("k_proj", c.num_key_value_heads), c.rope_theta)
    v = by_head("v_proj", c.num_key_value_heads)
    q = q.reshape(*q.shape[:2], c.num_key_value_heads, -1, c.head_dim)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", q, k, preferred_element_type=jnp.float32)
    logits = logits * c.query_pre_attn_scalar**-0.5
    if self.soft_cap and (cap := c.attn_logit_softcapping) is not None:
      logits = cap * jnp.tanh(logits / cap)
    # Finite, so that a row of padding without any key is not NaN.
    logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(self.dtype)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v).reshape(*x.shape[:2], -1)
    return _dense(c.hidden_size, self.dtype, name="o_proj")(out)


class _Mlp(nn.Module):
  config: GemmaFields
  dtype: Any

  @nn.compact
  def __call__(self, x):
    gate = _dense(self.config.intermediate_size, self.dtype, name="gate_proj")(x)
    up = _dense(self.config.intermediate_size, self.dtype, name="up_proj")(x)
    product = jax.nn.gelu(gate, approximate=True) * up
    return _dense(self.config.hidden_size, self.dtype, name="down_proj")(product)


def _dense(features: int, dtype: Any, *, name: str) -> nn.Dense:
  return nn.Dense(features, use_bias=False, dtype=dtype, param_dtype=dtype, name=name)


def rotate(x: jax.Array, theta: float) -> jax.Array:
  """Rotates channels i and i + D/2 of each head by position * theta^(-2i/D), in float32.

  Args:
    x: queries or keys by position, [B, L, heads, D].
    theta: the base of the frequencies.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-np.arange(half) / half)
  angle = (np.arange(x.shape[1])[:, None, None] * frequency).astype(np.float32)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = np.cos(angle), np.sin(angle)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def build_gemma(config: Mapping[str, Any], *, dtype: Any, soft_cap: bool = False) -> Gemma2:
  """Builds the network of a `Gemma2Model`'s `config.json`, without parameters.

  Args:
    config: the file's contents.
    dtype: of the computation and of matrices.
    soft_cap: cap attention's logits as `attn_logit_softcapping` says. diffusers' pipelines do
      not, because PyTorch's fused attention, which they use, cannot.

  Raises:
    UserError: a field is missing or not supported, or `dtype` is float16.
  """
  if jnp.dtype(dtype) == jnp.float16:
    raise UserError("Gemma 2 overflows in float16: compute in bfloat16 or float32")
  fields = config_files.make_record(GemmaFields, config, _SUPPORTED)
  if fields.num_attention_heads % fields.num_key_value_heads:
    raise UserError(
      f"num_attention_heads must be a multiple of num_key_value_heads (got "
      f"{fields.num_attention_heads} and {fields.num_key_value_heads})"
    )
  if fields.head_dim % 2:
    raise UserError(f"head_dim must be even (got {fields.head_dim})")
  kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(200)]
  if config.get("layer_types", kinds := kinds[: fields.num_hidden_layers]) != kinds:
    raise UserError("layer_types must alternate, and begin with 'sliding_attention'")
  return Gemma2(fields, dtype, soft_cap)


def encode(module: Gemma2, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """Computes the last hidden states [B, L, D] of token ids and a mask of tokens, [B, L]."""
  out: Any = module.apply({"params": params}, ids, mask)
  return out


def keep_prompt(values: jax.Array, length: int) -> jax.Array:
  """Keeps the first position and the last `length` - 1, as SANA does.

  Args:
    values: hidden states [B, M, D] or a mask [B, M] of an instruction and a prompt.
    length: number of positions to keep, at most M.
  """
  return jnp.concatenate([values[:, :1], values[:, values.shape[1] + 1 - length :]], axis=1)
