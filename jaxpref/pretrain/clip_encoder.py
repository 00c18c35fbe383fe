"""The small CLIP text encoder of a base: its configuration file and initial weights."""

from typing import Any

import flax
import jax

from jaxpref.models import text


def text_config(
  width: int, *, layers: int, heads: int, tokens: int, vocab_size: int, projects: bool = False
) -> dict[str, Any]:
  """Returns a text encoder's `config.json` for the shapes world.

  Args:
    width: of the hidden states, and of the projection.
    layers: number of layers.
    heads: number of heads.
    tokens: length of a text.
    vocab_size: number of tokens of the vocabulary, whose last two are START and END.
    projects: whether it has a projection of the pooled text.
  """
  name = "CLIPTextModelWithProjection" if projects else "CLIPTextModel"
  return {
    "_class_name": name,
    "architectures": [name],
    "bos_token_id": vocab_size - 2,
    "eos_token_id": vocab_size - 1,
    "hidden_act": "quick_gelu",
    "hidden_size": width,
    "intermediate_size": 4 * width,
    "max_position_embeddings": tokens,
    "model_type": "clip_text_model",
    "num_attention_heads": heads,
    "num_hidden_layers": layers,
    "pad_token_id": vocab_size - 1,
    "projection_dim": width,
    "vocab_size": vocab_size,
  }


def init(encoder: Any, key: jax.Array) -> Any:
  """Initializes parameters: token embeddings of std 1, position embeddings of std 0.3.

  The module's own embeddings have std 0.01. The layers' outputs would then be far larger:
  all tokens look the same after the last normalization, and training seldom recovers.
  """

  def sized(key):
    flat = flax.traverse_util.flatten_dict(text.init_text_encoder(encoder, key))
    sizes = {"token_embedding": 1.0, "position_embedding": 0.3}
    flat = {k: v * (sizes[k[-2]] / v.std()) if k[-2] in sizes else v for k, v in flat.items()}
    return flax.traverse_util.unflatten_dict(flat)

  return jax.jit(sized)(key)
