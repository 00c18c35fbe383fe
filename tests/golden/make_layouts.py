"""Writes `layouts/<family>.txt`: names and shapes of the tensors of PyTorch's own modules.

  python tests/golden/make_layouts.py

Full width, from `jaxpref/pipelines`, on PyTorch's meta device: nothing is allocated. A line a
tensor: part, name, shape.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import families  # noqa: E402


def build(part, config):
  """PyTorch's module of a part."""
  if part == "unet":
    return UNet2DConditionModel.from_config(config)
  if part == "vae":
    return AutoencoderKL.from_config(config)
  projected = config["architectures"] == ["CLIPTextModelWithProjection"]
  kind = CLIPTextModelWithProjection if projected else CLIPTextModel
  return kind(CLIPTextConfig(**config))


def layout(family):
  """The file's text."""
  lines = []
  for part, config in families.real_configs(family).items():
    if part in ("model_index", "scheduler"):
      continue
    with torch.device("meta"):
      module = build(part, config)
    lines += [f"{part} {n} {' '.join(map(str, p.shape))}" for n, p in module.named_parameters()]
  return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
  (HERE / "layouts").mkdir(exist_ok=True)
  for name in families.FAMILIES:
    (HERE / "layouts" / f"{name}.txt").write_text(layout(name))
