"""Scorers narrow enough for a test, with random weights, and photographs to score.

Weights are scaled up so that scores vary, and are the same everywhere.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import flax
import numpy as np
import pytest
from skimage import data

from jaxpref.models import blip, clip_towers, hub, save, torch_layout
from jaxpref.scorers.base import aesthetic_scores, store

PROMPTS = [
  "an astronaut in front of a flag",
  "a cup of coffee, “freshly brewed” &amp; hot",
  "A cat's   face",
  "a rocket " + "on its way up " * 30,
  "an astronaut in front of a flag",
  "naïve ﬁne art <|endoftext|> of a cat",
]


def photographs() -> list[np.ndarray]:
  """Square, wide, tall and small ones; the rocket's crops differ by a pixel."""
  cat = data.chelsea()
  tall = np.ascontiguousarray(data.rocket().swapaxes(0, 1))
  return [
    data.astronaut(),
    data.coffee(),
    cat,
    data.rocket(),
    tall,
    cat[100:180, 100:200].copy(),
  ]


def clip_config(activation: str, words: int) -> dict:
  """Returns a configuration whose text projection is square, as CLIP-H's is."""
  text_config = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": words,
    "hidden_act": activation,
    "projection_dim": 48,
    "eos_token_id": 2,
  }
  vision_config = {
    "hidden_size": 160,  # two heads of 80 channels
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 224,
    "patch_size": 28,
    "hidden_act": activation,
    "projection_dim": 48,
  }
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 48,
    "text_config": text_config,
    "vision_config": vision_config,
  }


def random_params(abstract, seed: int):
  """Fills a tree of shapes with float32 numbers of a size at which every layer matters."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, leaf in sorted(flax.traverse_util.flatten_dict(abstract).items()):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    kind = path[-1]
    if kind == "kernel":
      noise *= 1.5 / math.sqrt(math.prod(leaf.shape[:-1]))
    elif kind == "scale":
      noise = 1 + 0.3 * noise
    elif kind == "bias":
      noise *= 0.2
    elif kind == "logit_scale":
      noise = np.float32(4.6)
    params[path] = np.asarray(noise, np.float32)
  return flax.traverse_util.unflatten_dict(params)


def write_tokenizer(directory: Path) -> int:
  """Writes the bundled pipeline's tokenizer with CLIP's length; returns its number of words."""
  shutil.copytree(hub.BUNDLED["shapes"] / "tokenizer", directory, dirs_exist_ok=True)
  settings = json.loads((directory / "tokenizer_config.json").read_text())
  settings["model_max_length"] = 77
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  return len(json.loads((directory / "vocab.json").read_text()))


def open_clip_tensors(words: int, seed: int) -> dict[str, np.ndarray]:
  """Returns a model of the same sizes, except for wider MLPs, by open_clip's names."""
  rng = np.random.default_rng(seed)
  tensors = {"logit_scale": np.array(4.6, np.float32)}

  def add(name, *shape, scale=1.0, offset=0.0):
    tensors[name] = (offset + scale * rng.standard_normal(shape)).astype(np.float32)

  def add_norm(name, width):
    add(f"{name}.weight", width, scale=0.3, offset=1.0)
    add(f"{name}.bias", width, scale=0.2)

  def add_linear(name, out, width, joint="."):
    add(f"{name}{joint}weight", out, width, scale=1.5 / math.sqrt(width))
    add(f"{name}{joint}bias", out, scale=0.2)

  def add_blocks(prefix, width):
    for i in range(2):
      block = f"{prefix}transformer.resblocks.{i}"
      add_norm(f"{block}.ln_1", width)
      add_norm(f"{block}.ln_2", width)
      add_linear(f"{block}.attn.in_proj", 3 * width, width, joint="_")
      add_linear(f"{block}.attn.out_proj", width, width)
      add_linear(f"{block}.mlp.c_fc", 4 * width, width)
      add_linear(f"{block}.mlp.c_proj", width, 4 * width)

  add("positional_embedding", 77, 48)
  add("text_projection", 48, 48, scale=0.2)
  add("token_embedding.weight", words, 48)
  add("visual.class_embedding", 160)
  add("visual.positional_embedding", 65, 160)
  add("visual.proj", 160, 48, scale=0.1)
  add("visual.conv1.weight", 160, 3, 28, 28, scale=0.03)
  for name, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", 48)):
    add_norm(name, width)
  add_blocks("visual.", 160)
  add_blocks("", 48)
  return tensors


def open_clip_config(words: int) -> dict:
  """Returns the configuration of `open_clip_tensors`, in transformers' format."""
  config = clip_config("gelu", words)
  config["text_config"]["intermediate_size"] = 4 * 48
  config["vision_config"]["intermediate_size"] = 4 * 160
  return config


def image_reward_config(words: int) -> dict:
  """Returns a configuration with the published epsilons."""
  text_config = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": words,
  }
  vision_config = {
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-6,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 32,
  }
  return {"model_type": "blip", "text_config": text_config, "vision_config": vision_config}


def write_image_reward(directory: Path, seed: int) -> None:
  """Writes an ImageReward with a vocabulary of letters and a few words."""
  letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words = [*specials, *letters, *(f"##{c}" for c in letters), "astronaut", "cat", "rocket"]
  directory.mkdir(parents=True)
  (directory / "vocab.txt").write_text("\n".join(words) + "\n")
  config = image_reward_config(len(words) + 2)
  module = blip.build_image_reward(config, dtype=np.float32)
  params = random_params(blip.abstract_params(module), seed)
  tensors = torch_layout.export_tensors(params, np.float32)
  save.save_tensors(directory / "model.safetensors", tensors)
  (directory / "config.json").write_text(json.dumps(config))


def write_aesthetic(directory: Path, seed: int) -> None:
  """Writes an aesthetic head for the features of `clip_config`."""
  params = random_params(aesthetic_scores.abstract_head(directory.name, 48), seed)
  tensors = torch_layout.export_tensors(params, np.float32)
  save.save_tensors(directory / "model.safetensors", tensors)


def write_all(root: Path) -> None:
  """Writes the weights of all scorers."""
  write_clip(root / "clip.l14", "quick_gelu", 5)
  for seed, name in enumerate(("clip.h14", "hpsv2.v2_0", "hpsv2.v2_1", "pickscore.v1")):
    write_clip(root / name, "gelu", seed)
  write_aesthetic(root / "aesthetic.v1", 11)
  write_aesthetic(root / "aesthetic.v2", 12)
  write_image_reward(root / "imagereward.v1", 13)


@contextlib.contextmanager
def written_all(root: Path):
  """Writes the weights of all scorers, whose directory the environment then names."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(store.ROOT, str(root))
    write_all(root)
    yield root


def write_clip(directory: Path, activation: str, seed: int) -> None:
  """Writes a CLIP model as transformers does, with its tokenizer."""
  config = clip_config(activation, write_tokenizer(directory))
  module = clip_towers.build_clip(config, dtype=np.float32)
  params = random_params(clip_towers.abstract_clip(module), seed)
  tensors = torch_layout.export_tensors(params, np.float32)
  save.save_tensors(directory / "model.safetensors", tensors)
  (directory / "config.json").write_text(json.dumps(config))
