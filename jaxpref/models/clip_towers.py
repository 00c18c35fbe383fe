"""CLIP with both towers: transformers' Flax module as pure functions.

Parameters have the names of transformers' PyTorch class `CLIPModel`, see `torch_layout`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import CLIPConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPEncoderLayer, FlaxCLIPModule

from jaxpref.errors import UserError, first_line
from jaxpref.models.interceptors import patches_by_product, remat_modules

# Mean and standard deviation of the pixels that CLIP was trained on, in [0, 1], by channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# LAION's ViT-H/14, with the exact GELU. Its vision tower's heads have 80 channels.
H14: dict[str, Any] = {
  "model_type": "clip",
  "projection_dim": 1024,
  "text_config": {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
  },
  "vision_config": {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
  },
}
# OpenAI's ViT-L/14, with the quick GELU, x sigmoid(1.702 x).
L14: dict[str, Any] = {
  "model_type": "clip",
  "projection_dim": 768,
  "text_config": {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
  },
  "vision_config": {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "image_size": 224,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
  },
}


def build_clip(config: Mapping[str, Any], *, dtype: Any) -> nn.Module:
  """Builds the module of a CLIP model's `config.json`, without parameters.

  Args:
    config: in transformers' format, such as `H14`.
    dtype: of the computation.

  Raises:
    UserError: the configuration is not CLIP's.
  """
  if not (isinstance(config.get("text_config"), dict) and "vision_config" in config):
    raise UserError("it is not the configuration of a CLIP model with both towers")
  try:
    read = CLIPConfig(**config)
  except (TypeError, ValueError) as error:
    raise UserError(f"it is not the configuration of a CLIP model: {first_line(error)}") from (
      error
    )
  # For this value transformers takes the text's feature at the first of the highest ids, which
  # is the first end token. Configurations name that token or, older ones, this value.
  read.text_config.eos_token_id = 2
  return FlaxCLIPModule(read, dtype=dtype)


def abstract_clip(module: Any) -> Any:
  """Returns the shapes of the parameters, in the module's dtype; the logit scale is float32."""
  vision, text = module.config.vision_config, module.config.text_config
  ids = jax.ShapeDtypeStruct((1, text.max_position_embeddings), jnp.int32)
  pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), ids, pixels, ids, ids)["params"]
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, module.dtype if leaf.shape else jnp.float32),
    shapes,
  )


def image_features(
  module: Any, params: Any, pixels: jax.Array, *, remat: bool = False
) -> jax.Array:
  """Computes features of images: float32 [B, D] of length 1.

  Args:
    module: from `build_clip`.
    params: its parameters.
    pixels: float [B, S, S, 3], normalized with `MEAN` and `STD`.
    remat: recompute the inside of layers in a backward pass, instead of storing it.
  """

  def features(clip, x):
    return clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)

  recomputed = remat_modules((FlaxCLIPEncoderLayer,) if remat else ())
  with nn.intercept_methods(patches_by_product), nn.intercept_methods(recomputed):
    return _unit(module.apply({"params": params}, pixels.astype(module.dtype), method=features))


def text_features(module: Any, params: Any, ids: jax.Array) -> jax.Array:
  """Computes features of texts: float32 [B, D] of length 1.

  Each is taken at the first of the text's highest ids, the end token. Attention is causal, so
  padding after it does not matter.

  Args:
    module: from `build_clip`.
    params: its parameters.
    ids: token ids, int [B, L].
  """
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)

  def features(clip, ids):
    encoded = clip.text_model(
      input_ids=ids, attention_mask=jnp.ones_like(ids), position_ids=positions
    )
    return clip.text_projection(encoded.pooler_output)

  return _unit(module.apply({"params": params}, ids, method=features))


def _unit(features: jax.Array) -> jax.Array:
  wide = features.astype(jnp.float32)
  return wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)
