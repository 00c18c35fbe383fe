"""Writes numbers and names of PyTorch's diffusers for SANA's networks.

`sana.npz`: outputs of the reduced networks. `layouts/sana.txt`: names and shapes of the tensors
in diffusers 0.39's state_dict at the published configurations, from PyTorch's meta device; a
line a tensor, and * for the numbers of all blocks of a transformer.

  cd tests && PYTHONPATH=. python golden/make_sana.py
"""

import re
from pathlib import Path

import jax
import numpy as np
import sana_models
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel

from jaxpref.models import dc_ae, torch_layout
from jaxpref.models.dit import sana_transformer

HERE = Path(__file__).parent


def load(kind, build, config):
  """PyTorch's module with `random_params`; configurations of transformers are objects."""
  fields = config if isinstance(config, dict) else config.to_dict()
  shapes = jax.eval_shape(build(fields, dtype=np.float32).init_weights, jax.random.key(0))
  tensors = torch_layout.export_tensors(sana_models.random_params(shapes), np.float32)
  module = (kind.from_config(config) if fields is config else kind(config)).eval()
  module.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
  return module


@torch.no_grad()
def outputs():
  """Arrays by name."""
  found = {}
  x, t, text, mask = map(torch.tensor, sana_models.transformer_inputs())
  for name, config in sana_models.REDUCED.items():
    build = sana_transformer.build_sana_transformer
    model = load(SanaTransformer2DModel, build, config)
    found[name] = model(x, text, t, encoder_attention_mask=mask).sample.numpy()
  model = load(AutoencoderDC, dc_ae.build_dc_ae, sana_models.DC_AE)
  for size in sana_models.SIZES:
    image, latent = (
      torch.tensor(sana_models.image(size)),
      torch.tensor(sana_models.latent(size)),
    )
    found[f"encoded/{size}"] = model.encode(image).latent.numpy()
    found[f"decoded/{size}"] = model.decode(latent).sample.numpy()
  return found


def layout():
  """The text of `layouts/sana.txt`."""
  lines = set()
  for name, config in sana_models.PUBLISHED.items():
    kind = AutoencoderDC if "AutoencoderDC" in config["_class_name"] else SanaTransformer2DModel
    with torch.device("meta"):
      tensors = kind.from_config(config).state_dict()
    for key, tensor in tensors.items():
      folded = re.sub(r"(?<=transformer_blocks\.)\d+", "*", key)
      lines.add(f"{name} {folded} {' '.join(map(str, tensor.shape))}")
  return "\n".join(sorted(lines)) + "\n"


if __name__ == "__main__":
  np.savez_compressed(HERE / "sana.npz", **outputs())
  (HERE / "layouts" / "sana.txt").write_text(layout())
