"""Scores of the PyTorch originals: transformers' models and image processor, torch's resize.

open_clip's own class is imported where it is used, since most environments do not have it.
"""

import json
import re
from pathlib import Path

import numpy as np
import scorer_models
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
  BertTokenizer,
  BlipTextConfig,
  BlipTextModel,
  BlipVisionConfig,
  BlipVisionModel,
  CLIPImageProcessor,
  CLIPModel,
  CLIPTokenizer,
  CLIPTokenizerFast,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = Image.Resampling.BICUBIC
# ImageReward's names of the image encoder's modules (timm's), and transformers'.
_VISION = {
  r"cls_token": "embeddings.class_embedding",
  r"pos_embed": "embeddings.position_embedding",
  r"patch_embed\.proj": "embeddings.patch_embedding",
  r"blocks\.(\d+)\.norm": r"encoder.layers.\1.layer_norm",
  r"blocks\.(\d+)\.attn\.qkv": r"encoder.layers.\1.self_attn.qkv",
  r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
  r"blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
  r"norm": "post_layernorm",
}


def resized_sizes(height: int, width: int) -> tuple[int, int]:
  """Returns the size at which the shortest edge has 224 pixels."""
  return int(224 * max(1, height / width)), int(224 * max(1, width / height))


def interpolate_and_crop(pixels: torch.Tensor, *, antialias: bool) -> torch.Tensor:
  """Resizes [N, 3, H, W] as torchvision does tensors."""
  tall, wide = resized_sizes(*pixels.shape[2:])
  top, left = round((tall - 224) / 2), round((wide - 224) / 2)
  pixels = functional.interpolate(pixels, (tall, wide), mode="bicubic", antialias=antialias)
  return pixels[..., top : top + 224, left : left + 224]


def resize_and_crop(image: np.ndarray, variant: str, dtype=torch.float32) -> torch.Tensor:
  """Returns what torchvision's transforms give: float [3, 224, 224], about in [0, 1]."""
  if variant == "pil":
    tall, wide = resized_sizes(*image.shape[:2])
    top, left = round((tall - 224) / 2), round((wide - 224) / 2)
    resized = np.asarray(Image.fromarray(image).resize((wide, tall), BICUBIC))
    cropped = resized[top : top + 224, left : left + 224]
    return torch.tensor(cropped).permute(2, 0, 1) / 255
  pixels = torch.tensor(image).permute(2, 0, 1)[None].to(dtype) / 255
  return interpolate_and_crop(pixels, antialias=variant == "tensor_aa")[0]


def normalized(pixels: torch.Tensor) -> torch.Tensor:
  """Normalizes channels of [..., 3, H, W]."""
  mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
  return (pixels - mean) / std


def pixel_values(image: np.ndarray, variant: str) -> torch.Tensor:
  """Returns the input of CLIP's image encoder, [3, 224, 224]."""
  if variant == "hf":
    found = CLIPImageProcessor()(Image.fromarray(image), return_tensors="pt")
    return found["pixel_values"][0]
  return normalized(resize_and_crop(image, variant))


def token_ids(directory: Path, prompts, cleaning: str, *, padding=True) -> torch.Tensor:
  """Returns token ids, by default padded to the longest."""
  kind = CLIPTokenizerFast if cleaning == "fast" else CLIPTokenizer
  tokenizer = kind.from_pretrained(directory)
  return tokenizer(prompts, padding=padding, truncation=True, return_tensors="pt")["input_ids"]


def _unit(features: torch.Tensor) -> torch.Tensor:
  return features / features.norm(dim=-1, keepdim=True)


def clip_scores(
  directory: Path, values: torch.Tensor, prompts, *, cleaning: str, scale: float | None
) -> torch.Tensor:
  """Returns scaled cosines by transformers' `CLIPModel`; None is its own scale."""
  model = CLIPModel.from_pretrained(directory).eval()
  of_images = model.get_image_features(pixel_values=values)
  of_texts = model.get_text_features(input_ids=token_ids(directory, prompts, cleaning))
  cosines = (_unit(of_images) * _unit(of_texts)).sum(-1)
  return (model.logit_scale.exp() if scale is None else scale) * cosines


@torch.no_grad()
def open_clip_scores(words: int, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
  """Returns 100 cosines of open_clip's own class, with its weights by its own names."""
  import open_clip

  vision = {"image_size": 224, "layers": 2, "width": 160, "head_width": 80, "patch_size": 28}
  text = {"context_length": 77, "vocab_size": words, "width": 48, "heads": 3, "layers": 2}
  model = open_clip.CLIP(48, vision, text).eval()
  tensors = scorer_models.open_clip_tensors(words, 7)
  model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
  of_images = model.encode_image(values, normalize=True)
  of_texts = model.encode_text(ids, normalize=True)
  return 100 * (of_images * of_texts).sum(-1)


def aesthetic_scores(head: Path, clip: Path, values: torch.Tensor) -> torch.Tensor:
  """Returns the scores of a linear head, or of the authors' layers with dropouts between."""
  tensors = load_file(head / "model.safetensors")
  if "weight" in tensors:
    layers = torch.nn.Linear(tensors["weight"].shape[1], 1)
    layers.load_state_dict(tensors)
  else:
    nn, width = torch.nn, tensors["layers.0.weight"].shape[1]
    layers = nn.Sequential(
      *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
      *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    layers.load_state_dict({n.removeprefix("layers."): t for n, t in tensors.items()})
  model = CLIPModel.from_pretrained(clip).eval()
  return layers.eval()(_unit(model.get_image_features(pixel_values=values)))[:, 0]


def image_reward_scores(directory: Path, values: torch.Tensor, prompts) -> torch.Tensor:
  """Returns ImageReward's scores, with transformers' encoders of BLIP."""
  config = json.loads((directory / "config.json").read_text())
  tensors = load_file(directory / "model.safetensors")
  vision = BlipVisionModel(BlipVisionConfig(**config["vision_config"])).eval()
  width = config["vision_config"]["hidden_size"]
  text = BlipTextModel(
    BlipTextConfig(**config["text_config"], encoder_hidden_size=width), add_pooling_layer=False
  ).eval()
  _load(vision, tensors, "blip.visual_encoder.", _VISION)
  _load(text, tensors, "blip.text_encoder.", {})
  tokenizer = BertTokenizer.from_pretrained(directory)
  tokenizer.add_special_tokens({"bos_token": "[DEC]"})
  tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
  tokens = tokenizer(
    prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
  )
  seen = vision(pixel_values=values).last_hidden_state
  found = text(
    input_ids=tokens["input_ids"],
    attention_mask=tokens["attention_mask"],
    encoder_hidden_states=seen,
    is_decoder=False,  # otherwise attention would be causal
  ).last_hidden_state[:, 0]
  for i in (0, 2, 4, 6, 7):
    layer = f"mlp.layers.{i}"
    found = functional.linear(found, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])
  return (found[:, 0] - 0.16717362830052426) / 1.0333394966054072


def _load(model, tensors, prefix: str, names: dict[str, str]) -> None:
  state = {}
  for name, tensor in tensors.items():
    if name.startswith(prefix):
      short = name.removeprefix(prefix)
      for ours, theirs in names.items():
        short, done = re.subn(f"^{ours}", theirs, short)
        if done:
          break
      state[short] = tensor
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {"embeddings.position_ids"}, (missing, unexpected)
