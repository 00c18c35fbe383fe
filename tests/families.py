"""Stable Diffusion 1.5, 2.1 and XL pipelines that are narrow enough for a test.

They are the configurations of the public repositories (`jaxpref/pipelines`) with fewer
channels, layers and words. All other settings stay: heads per block, linear projections,
layers per block, text_time conditioning, activations and schedules.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.models import pipeline, save, text
from jaxpref.models.families import sdxl

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
from rehearsal import random_params, write_tiny  # noqa: E402, F401 - write_tiny for tests

CONFIGS = Path(pipeline.__file__).parent.parent / "pipelines"
FAMILIES = ("sd15", "sd21", "sdxl")
PARTS = sdxl.FAMILY.parts
PROMPTS = ["a red circle left of two blue squares", "Three small stars, painted!"]
WIDTHS = (32, 48)  # of the text encoders


def real_configs(family: str) -> dict[str, dict[str, Any]]:
  """Reads the configuration files of a family, by part."""
  files = {"model_index": CONFIGS / family / "model_index.json"}
  files |= {p.parent.name: p for p in (CONFIGS / family).glob("*/*config.json")}
  return {name: json.loads(file.read_text()) for name, file in files.items()}


def describe(family: str, directory: Path, *, dtype: Any = np.float32) -> pipeline.Pipeline:
  """Describes a family's pipeline at full width; writes its configurations to `directory`."""
  return pipeline.describe_pipeline(str(write_configs(family, directory)), dtype=dtype)


def write_configs(family: str, directory: Path, **reduced: Any) -> Path:
  """Writes a pipeline's configurations without weights.

  Args:
    family: one of `FAMILIES`.
    directory: where they are written.
    **reduced: arguments of `reduced_configs`; without any, the width is the real one.
  """
  configs = reduced_configs(family, **reduced) if reduced else real_configs(family)
  places = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
  for name, config in configs.items():
    target = directory / places.get(name, f"{name}/config.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(config))
  return directory


def reduced_configs(
  family: str, *, vocab_size: int, shallow: bool = False
) -> dict[str, dict[str, Any]]:
  """Returns the configurations of a family with fewer channels, layers and words.

  Args:
    family: one of `FAMILIES`.
    vocab_size: number of words of the tokenizers.
    shallow: also remove levels and layers, for tests that train.
  """
  configs = real_configs(family)
  unet, vae = configs["unet"], configs["vae"]
  channels = [32, 64, 64, 64][: len(unet["block_out_channels"])]
  heads = unet["attention_head_dim"]
  encoders = [name for name in configs if name.startswith("text_encoder")]
  unet |= {
    "block_out_channels": channels,
    "attention_head_dim": 4 if isinstance(heads, int) else [1, 2, 4, 4][: len(heads)],
    "cross_attention_dim": sum(WIDTHS[: len(encoders)]),
    "sample_size": 8 * 2 ** (len(channels) - 3),
  }
  if "transformer_layers_per_block" in unet:
    unet["transformer_layers_per_block"] = [1, 2, 3]
  if family == "sdxl":
    unet |= {
      "addition_time_embed_dim": 8,
      "projection_class_embeddings_input_dim": 48 + WIDTHS[1],
    }
  vae |= {"block_out_channels": [32, 32, 64, 64], "sample_size": 8 * unet["sample_size"]}
  if shallow or family != "sd15":  # testing one family at its real depth is enough
    unet["layers_per_block"] = vae["layers_per_block"] = 1
    if "transformer_layers_per_block" in unet:
      unet["transformer_layers_per_block"] = [1, 1, 1]
  if shallow and family == "sdxl":  # keep two of the three levels
    for field in ("block_out_channels", "attention_head_dim", "down_block_types"):
      unet[field] = unet[field][:2]
    unet["up_block_types"] = unet["up_block_types"][1:]
    unet["transformer_layers_per_block"] = [1, 1]
  if shallow and family == "sd15":  # keep two of the four levels, one without attention
    unet["block_out_channels"] = channels[:2]
    unet["down_block_types"] = unet["down_block_types"][2:]
    unet["up_block_types"] = unet["up_block_types"][:2]
    unet["sample_size"] = 8
  for i, name in enumerate(sorted(encoders)):
    configs[name] |= {
      "hidden_size": WIDTHS[i],
      "intermediate_size": 4 * WIDTHS[i],
      "num_attention_heads": 4,
      "num_hidden_layers": 3 + i,
      "projection_dim": WIDTHS[i],
      "vocab_size": vocab_size,
    }
  return configs


def write_pipeline(family: str, directory: Path, *, shallow: bool = False) -> Path:
  """Writes a reduced pipeline with random weights in diffusers' layout; returns its path."""
  text.train_tokenizer(PROMPTS, directory / "tokenizer", vocab_size=560, max_length=77)
  vocab_size = len(text.load_tokenizer(directory / "tokenizer"))
  configs = reduced_configs(family, vocab_size=vocab_size, shallow=shallow)
  if "text_encoder_2" in configs:  # its padding token differs from the end token
    text.train_tokenizer(PROMPTS, directory / "tokenizer_2", vocab_size=560, max_length=77)
    file = directory / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "!"}))
  params = random_params(pipeline.build_modules(configs))
  target = directory / family
  save.save_pipeline(
    target, params, configs=configs, tokenizers_from=directory, dtype=np.float32
  )
  return target


def write_improver(base: Path, target: Path) -> Path:
  """Writes an improver based on a pipeline, with random weights for the clean-image input."""
  loaded = pipeline.load_pipeline(str(base))
  wide = pipeline.widen(loaded)
  kernel = np.array(wide.params["unet"]["conv_in"]["kernel"])
  new = kernel[:, :, loaded.latent_shape[0] :]
  new[...] = np.random.default_rng(0).standard_normal(new.shape) / 3
  wide.params["unet"]["conv_in"]["kernel"] = kernel
  save.save_pipeline(
    target, wide.params, configs=wide.configs, tokenizers_from=loaded.path, dtype=np.float32
  )
  return target
