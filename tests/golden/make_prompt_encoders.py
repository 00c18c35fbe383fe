"""Writes numbers and names of PyTorch's transformers for the text encoders of flow models.

`prompt_encoders.npz`: a part of the outputs of the reduced encoders.
`layouts/prompt_encoders.txt`: names and shapes of the tensors in transformers 4.57's state_dict
at the published configurations; a line a tensor, and * for the number of a layer.

  cd tests && PYTHONPATH=. python golden/make_prompt_encoders.py
"""

import re
from pathlib import Path

import numpy as np
import prompt_encoders
import torch
import transformers

from jaxpref.models import gemma, t5, text, torch_layout

HERE = Path(__file__).parent


def torch_class(config):
  """transformers' class and configuration of a configuration."""
  if "d_model" in config:
    return transformers.T5EncoderModel, transformers.T5Config(**config)
  if "head_dim" in config:
    return transformers.Gemma2Model, transformers.Gemma2Config(**config)
  kind = transformers.CLIPTextModel
  if config.get("architectures"):
    kind = transformers.CLIPTextModelWithProjection
  return kind, transformers.CLIPTextConfig(**config)


def load(build, config, *, attention="sdpa"):
  """PyTorch's module with `random_params`."""
  params = prompt_encoders.random_params(build(config, dtype=np.float32))
  tensors = torch_layout.export_tensors(params, np.float32)
  kind, read = torch_class(config)
  own = {} if kind is transformers.T5EncoderModel else {"attn_implementation": attention}
  module = kind._from_config(read, **own).eval()
  missing, surplus = module.load_state_dict(
    {name: torch.tensor(array) for name, array in tensors.items()}, strict=False
  )
  assert missing in ([], ["encoder.embed_tokens.weight"]) and not surplus
  return module


@torch.no_grad()
def outputs():
  """Whole outputs by name."""
  found = {}
  model = load(t5.build_t5, prompt_encoders.T5)
  found["t5"] = model(torch.tensor(prompt_encoders.t5_ids()))[0]
  ids, mask = map(torch.tensor, prompt_encoders.gemma_ids())
  for name, attention in (("gemma", "sdpa"), ("gemma-capped", "eager")):
    model = load(gemma.build_gemma, prompt_encoders.GEMMA, attention=attention)
    found[name] = model(ids, attention_mask=mask)[0]
  ids = torch.tensor(prompt_encoders.clip_ids())
  out = [
    load(text.build_text_encoder, config)(ids, output_hidden_states=True)
    for config in prompt_encoders.CLIPS
  ]
  found["pair"] = torch.cat([o.hidden_states[-2] for o in out], dim=-1)
  found["pair-pooled"] = torch.cat([o.text_embeds for o in out], dim=-1)
  for eos, config in prompt_encoders.POOLED.items():
    found[f"pooled-{eos}"] = load(text.build_text_encoder, config)(ids).pooler_output
  return {name: value.numpy() for name, value in found.items()}


def sampled(name, value):
  """The part of an output that the file holds: every 23rd token of T5's."""
  return value[:, ::23] if name == "t5" else value


def layout():
  """The text of `layouts/prompt_encoders.txt`."""
  lines = set()
  for name, (_, config, _) in prompt_encoders.PUBLISHED.items():
    kind, read = torch_class(config)
    with torch.device("meta"):
      tensors = kind(read).state_dict()
    for key, tensor in tensors.items():
      folded = re.sub(r"\b(block|layers)\.\d+\b", r"\1.*", key)
      folded = key if "relative" in key else folded
      lines.add(f"{name} {folded} {' '.join(map(str, tensor.shape))}")
  return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
  kept = {name: sampled(name, value) for name, value in outputs().items()}
  np.savez_compressed(HERE / "prompt_encoders.npz", **kept)
  (HERE / "layouts" / "prompt_encoders.txt").write_text(layout())
