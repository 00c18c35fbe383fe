"""Writes `program_names.json`: where ComfyUI and A1111's web UI look for a LoRA's layers.

By the rules of both for kohya's files: a layer is `lora_unet_` and diffusers' name of it with
underscores for dots, and stands in the original UNet, of two resnets in each block, as
`place` says. Names are those of diffusers' UNets; the layers, the default targets.

python tests/golden/make_program_names.py
"""

import json
import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

HERE = Path(__file__).parent
PIPELINES = HERE.parent.parent / "jaxpref" / "pipelines"
LAYERS = re.compile(r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$")


def place(name: str) -> str:
  """The original name of a layer in a transformer: its block's number, then 1, then its own."""
  if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
    return f"middle_block.1.{match[1]}"
  match = re.fullmatch(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.+)", name)
  block, number = int(match[2]), int(match[3])
  if match[1] == "down":
    return f"input_blocks.{1 + 3 * block + number}.1.{match[4]}"
  return f"output_blocks.{3 * block + number}.1.{match[4]}"


table = {}
for family in ("sd15", "sdxl"):
  config = json.loads((PIPELINES / family / "unet" / "config.json").read_text())
  with torch.device("meta"):
    unet = UNet2DConditionModel.from_config(config)
  layers = [name for name, _ in unet.named_modules() if LAYERS.search(name)]
  table[family] = {f"lora_unet_{name.replace('.', '_')}": place(name) for name in layers}
(HERE / "program_names.json").write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
