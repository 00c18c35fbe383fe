"""ImageReward's network (Xu et al., 2023, arXiv 2304.05977): BLIP's two encoders and a head.

A vision transformer sees the image; BERT reads the prompt and attends to all image tokens in
every layer. Modules have the full names of the published PyTorch tensors.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import BlipConfig

from jaxpref.errors import UserError, first_line
from jaxpref.models.interceptors import patches_by_product

# Mean and standard deviation of scores in the authors' data; a score is relative to them.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
# Outputs of the head's layers; numbers in its names count dropouts too.
_HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
_EYE, _READER = "blip.visual_encoder", "blip.text_encoder"

# ViT-L/16 and BERT-base, as published.
IMAGE_REWARD: dict[str, Any] = {
  "model_type": "blip",
  "text_config": {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30524,
  },
  "vision_config": {
    "hidden_size": 1024,
    "image_size": 224,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 16,
  },
}
# Parts of the file that do not influence the score.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", f"{_READER}.embeddings.position_ids")


class ImageReward(nn.Module):
  """Scores of images for prompts.

  Attributes:
    config: sizes of the two encoders.
    dtype: of the computation; the head is float32.
  """

  config: BlipConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes scores, float32 [B].

    Args:
      pixels: normalized images, float [B, S, S, 3].
      ids: token ids, int [B, L]; the first is [CLS].
      mask: 1 for tokens, 0 for padding, int [B, L].
    """
    x = self._read(ids, mask.astype(bool), self._see(pixels))[:, 0].astype(jnp.float32)
    for number, width in _HEAD.items():
      x = nn.Dense(width, name=f"mlp.layers.{number}")(x)
    return (x[:, 0] - _MEAN) / _STD

  def _see(self, pixels: jax.Array) -> jax.Array:
    """Encodes images: [B, patches + 1, D], normalized; pre-norm blocks."""
    c = self.config.vision_config
    patch = (c.patch_size, c.patch_size)
    name = f"{_EYE}.patch_embed.proj"
    with nn.intercept_methods(patches_by_product):
      x = nn.Conv(c.hidden_size, patch, patch, "VALID", dtype=self.dtype, name=name)(
        pixels.astype(self.dtype)
      )
    x = x.reshape(len(x), -1, c.hidden_size)
    first = self._param(f"{_EYE}.cls_token", 1, c.hidden_size)
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden_size)), x], axis=1)
    x = x + self._param(f"{_EYE}.pos_embed", x.shape[1], c.hidden_size)
    for i in range(c.num_hidden_layers):
      block = f"{_EYE}.blocks.{i}"
      qkv = self._dense(f"{block}.attn.qkv", 3 * c.hidden_size)(
        self._norm(f"{block}.norm1", c.layer_norm_eps)(x)
      )
      query, key, value = jnp.split(qkv, 3, axis=-1)
      found = _attend(query, key, value, c.num_attention_heads)
      x = x + self._dense(f"{block}.attn.proj", c.hidden_size)(found)
      wide = self._dense(f"{block}.mlp.fc1", c.intermediate_size)(
        self._norm(f"{block}.norm2", c.layer_norm_eps)(x)
      )
      x = x + self._dense(f"{block}.mlp.fc2", c.hidden_size)(_gelu(wide))
    return self._norm(f"{_EYE}.norm", c.layer_norm_eps)(x)

  def _read(self, ids: jax.Array, mask: jax.Array, image: jax.Array) -> jax.Array:
    """Encodes texts that attend to images: [B, L, D]; post-norm layers, no causal mask."""
    c = self.config.text_config
    place = f"{_READER}.embeddings"
    x = self._embed(f"{place}.word_embeddings", c.vocab_size, c.hidden_size)(ids)
    positions = jnp.arange(ids.shape[1])[None]
    x = x + self._embed(
      f"{place}.position_embeddings", c.max_position_embeddings, c.hidden_size
    )(positions)
    x = self._norm(f"{place}.LayerNorm", c.layer_norm_eps)(x)
    for i in range(c.num_hidden_layers):
      layer = f"{_READER}.encoder.layer.{i}"
      x = self._attention(f"{layer}.attention", x, x, mask[:, None, None, :])
      x = self._attention(f"{layer}.crossattention", x, image, None)
      wide = _gelu(self._dense(f"{layer}.intermediate.dense", c.intermediate_size)(x))
      x = self._output(f"{layer}.output", wide, x)
    return x

  def _attention(self, name: str, x: jax.Array, source: jax.Array, mask: Any) -> jax.Array:
    width = self.config.text_config.hidden_size
    query = self._dense(f"{name}.self.query", width)(x)
    key = self._dense(f"{name}.self.key", width)(source)
    value = self._dense(f"{name}.self.value", width)(source)
    found = _attend(query, key, value, self.config.text_config.num_attention_heads, mask)
    return self._output(f"{name}.output", found, x)

  def _output(self, name: str, x: jax.Array, residual: jax.Array) -> jax.Array:
    c = self.config.text_config
    summed = self._dense(f"{name}.dense", c.hidden_size)(x) + residual
    return self._norm(f"{name}.LayerNorm", c.layer_norm_eps)(summed)

  def _param(self, name: str, tokens: int, width: int) -> jax.Array:
    shape = (1, tokens, width)
    return self.param(name, nn.initializers.normal(0.02), shape).astype(self.dtype)

  def _dense(self, name: str, width: int) -> nn.Dense:
    return nn.Dense(width, dtype=self.dtype, name=name)

  def _embed(self, name: str, count: int, width: int) -> nn.Embed:
    return nn.Embed(count, width, dtype=self.dtype, name=name)

  def _norm(self, name: str, epsilon: float) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, dtype=self.dtype, name=name)


def _gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


def _attend(query, key, value, heads: int, mask: Any = None) -> jax.Array:
  """Computes attention of [B, Q, D] to [B, K, D] in `heads` heads."""
  q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
  return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(query.shape)


def build_image_reward(config: Mapping[str, Any], *, dtype: Any) -> ImageReward:
  """Builds the module of a `config.json` like `IMAGE_REWARD`, without parameters.

  Raises:
    UserError: it is not such a configuration.
  """
  if not all(isinstance(config.get(part), dict) for part in ("text_config", "vision_config")):
    raise UserError("it does not have the sections text_config and vision_config")
  try:
    return ImageReward(BlipConfig(**config), dtype=dtype)
  except (TypeError, ValueError) as error:
    raise UserError(f"it is not the configuration of BLIP: {first_line(error)}") from error


def abstract_params(module: ImageReward) -> Any:
  """Returns the shapes of the parameters, in the module's dtype; the head's are float32."""
  size = module.config.vision_config.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), pixels, ids, ids)["params"]

  def cast(path, leaf):
    dtype = jnp.float32 if path[0].key.startswith("mlp.") else module.dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  return jax.tree.map_with_path(cast, shapes)
