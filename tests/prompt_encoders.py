"""Text encoders of flow models for tests: configurations, random weights and inputs."""

import flax
import numpy as np

from jaxpref.models import gemma, pipeline, t5, text

_CLIP = {"max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0}
_CLIP_L = {
  **_CLIP,
  **{"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072},
  **{"num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768},
}
_CLIP_G = {
  **_CLIP,
  **{"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120},
  **{"num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280},
}
_PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
T5_XXL = {
  **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24},
  **{"num_heads": 64, "feed_forward_proj": "gated-gelu"},
}
GEMMA_2B = {
  **{"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216},
  **{"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4},
  **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
}
# Name: builder, configuration, number of parameters.
PUBLISHED = {
  "clip-l-projected": (text.build_text_encoder, _CLIP_L | _PROJECTED, 123_650_304),
  "clip-l": (text.build_text_encoder, _CLIP_L, 123_060_480),
  "clip-g-projected": (text.build_text_encoder, _CLIP_G | _PROJECTED, 694_659_840),
  "t5-xxl": (t5.build_t5, T5_XXL, 4_762_310_656),
  "gemma-2-2b": (gemma.build_gemma, GEMMA_2B, 2_614_341_888),
}

T5 = {
  **{"vocab_size": 500, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
  **{"feed_forward_proj": "gated-gelu", "eos_token_id": 1},
}
GEMMA = {
  **{"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
  **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
  **{"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
}


def clip_config(width: int, act: str, *, eos: int, projected: bool) -> dict:
  """A CLIP text encoder of three layers."""
  config = {
    **{"hidden_act": act, "hidden_size": width, "intermediate_size": 2 * width},
    **{"max_position_embeddings": 20, "num_attention_heads": 4, "num_hidden_layers": 3},
    **{"projection_dim": width - 8, "vocab_size": 600, "eos_token_id": eos},
  }
  return config | (_PROJECTED if projected else {})


CLIPS = [
  clip_config(32, "quick_gelu", eos=2, projected=True),
  clip_config(48, "gelu", eos=2, projected=True),
]
# The end token by its id, and as the largest id.
POOLED = {eos: clip_config(32, "quick_gelu", eos=eos, projected=False) for eos in (2, 559)}


def abstract(module) -> dict:
  """Shapes of a module's parameters."""
  return pipeline.abstract_params(module)


def random_params(module) -> dict:
  """Parameters whose part in the output shows, float32."""
  rng = np.random.default_rng(0)
  params = {}
  for path, leaf in sorted(flax.traverse_util.flatten_dict(abstract(module)).items()):
    array = rng.standard_normal(leaf.shape)
    if path[-1] == "kernel":
      array /= np.sqrt(leaf.shape[0]) * (2 if path[-2] == "q" else 1)  # T5 has no scale
    elif leaf.ndim == 1:
      array = (path[-1] == "scale") + 0.3 * array
    elif path[-1] == "embedding" and "text_model" in path:
      array *= 0.5
    params[path] = array.astype(np.float32)
  return flax.traverse_util.unflatten_dict(params)


def build(name, dtype=np.float32):
  """Builds 't5', 'gemma' or 'gemma-capped'."""
  if name == "t5":
    return t5.build_t5(T5, dtype=dtype)
  return gemma.build_gemma(GEMMA, dtype=dtype, soft_cap="capped" in name)


def check(got, want):
  """Compares with PyTorch's numbers."""
  assert got.dtype == np.float32 and got.shape == want.shape
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def t5_ids() -> np.ndarray:
  """300 tokens, so that every bucket of positions is used; most of one text is padding."""
  ids = np.random.default_rng(1).integers(3, 500, (2, 300)).astype(np.int32)
  ids[1, 20], ids[1, 21:] = 1, 0
  return ids


def gemma_ids() -> tuple[np.ndarray, np.ndarray]:
  """Ids and a mask; the text is longer than the window, and the second is padded."""
  ids = np.random.default_rng(2).integers(4, 500, (2, 21)).astype(np.int32)
  mask = np.ones_like(ids)
  ids[1, 16:] = mask[1, 16:] = 0
  return ids, mask


def clip_ids() -> np.ndarray:
  """Texts of three lengths; 559 is the end token, and in one a larger, added token precedes."""
  ids = np.random.default_rng(3).integers(0, 500, (3, 20)).astype(np.int32)
  for row, end in enumerate((19, 7, 12)):
    ids[row, end:] = 559
  ids[2, 5] = 580
  return ids
