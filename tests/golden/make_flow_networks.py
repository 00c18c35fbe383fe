"""Writes `flow_networks.npz` and `flow_layouts.json.gz`, from PyTorch's diffusers.

  PYTHONPATH=. python tests/golden/make_flow_networks.py

The first holds outputs of reduced networks. The second holds names and shapes of all tensors of
the published networks, those of diffusers 0.39's state_dict at the published configurations, on
PyTorch's meta device: nothing is allocated.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import flow_networks  # noqa: E402

TRANSFORMERS = [name for name in flow_networks.PUBLISHED if "vae" not in name]


def outputs() -> dict[str, np.ndarray]:
  """Predictions of the reduced transformers, and what the reduced VAE makes."""
  numbers = {}
  for name in TRANSFORMERS:
    config = flow_networks.reduced(name)
    params = flow_networks.random_params(flow_networks.build(config))
    module = flow_networks.torch_module(config, params)
    with torch.no_grad():
      out = flow_networks.torch_output(module, flow_networks.inputs(config))
    numbers[name] = out.numpy()
  config = flow_networks.reduced("sd3-vae")
  params = flow_networks.random_params(flow_networks.build(config))
  made = flow_networks.torch_vae(flow_networks.torch_module(config, params))
  numbers |= {f"sd3-vae/{key}": value for key, value in made.items()}
  return numbers


def layout(name: str) -> dict[str, list[int]]:
  """Shapes of a published network's tensors by name."""
  with torch.device("meta"):
    module = flow_networks.torch_module(flow_networks.PUBLISHED[name])
  return {key: list(x.shape) for key, x in sorted(module.state_dict().items())}


if __name__ == "__main__":
  np.savez_compressed(HERE / "flow_networks.npz", **outputs())
  shapes = json.dumps({name: layout(name) for name in flow_networks.PUBLISHED})
  (HERE / "flow_layouts.json.gz").write_bytes(gzip.compress(shapes.encode(), mtime=0))
