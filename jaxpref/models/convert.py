"""Parameter trees of diffusers' and transformers' Flax modules to PyTorch's names, and back.

PyTorch is not needed: tensors are numpy arrays from and for safetensors. What a Flax module
calls `down_blocks_0/resnets_1/conv1/kernel` [kh, kw, in, out] is PyTorch's
`down_blocks.0.resnets.1.conv1.weight` [out, in, kh, kw].
"""

import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np

from jaxpref.errors import UserError

# Flax joins list indices by underscore; these are the lists (conv1, linear_1 are names).
_LISTS = re.compile(
  r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
  r"|to_out|net)_(\d+)"
)
# Names of the VAE's attention as diffusers writes them since 0.14, by Flax's names, which
# are those of older files, Stable Diffusion 1.x's among them.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Buffers that older files carry along.
_IGNORED = ("text_model.embeddings.position_ids",)


def torch_name(path: tuple[str, ...]) -> str:
  """PyTorch's name of the Flax parameter at `path`."""
  *modules, leaf = path
  parts = [_VAE_ATTENTION.get(m, _LISTS.sub(r"\1.\2", m)) for m in modules]
  leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
  return ".".join([*parts, leaf])


def _current_name(name: str) -> str:
  """The name of a tensor today, whenever its file was written."""
  parts = name.split(".")
  if "attentions" in parts:
    parts = [_VAE_ATTENTION.get(p, p) for p in parts]
  return ".".join(parts)


def to_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """A Flax parameter in PyTorch's order of axes; a view."""
  if path[-1] != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _to_flax_layout(
  path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  if path[-1] != "kernel":
    return array
  if len(shape) == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
    array = array[:, :, 0, 0]  # a linear layer that was saved as a 1 x 1 convolution
  if len(shape) == 4 and array.ndim == 2:
    array = array[:, :, None, None]
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def export_tensors(params: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
  """A Flax tree as PyTorch tensors by name, contiguous, in `dtype`."""
  flat = flax.traverse_util.flatten_dict(jax.device_get(params))
  return {
    torch_name(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(a)), dtype)
    for path, a in flat.items()
  }


def import_tensors(
  tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
  """PyTorch tensors as the Flax tree `abstract`, in its dtypes.

  Args:
    tensors: by PyTorch's names.
    abstract: tree of `jax.ShapeDtypeStruct`, as `jax.eval_shape` of the module's init.
    where: named in the error.

  Raises:
    UserError: tensors are missing, left over, or of another shape; names them all.
  """
  flat = flax.traverse_util.flatten_dict(abstract)
  names = {torch_name(path): path for path in flat}
  found = {_current_name(n): a for n, a in tensors.items() if n not in _IGNORED}
  problems = [f"missing {n} {flat[names[n]].shape}" for n in sorted(names - found.keys())]
  problems += [f"surplus {n} {found[n].shape}" for n in sorted(found.keys() - names.keys())]
  params = {}
  for name in names.keys() & found.keys():
    path, want = names[name], flat[names[name]]
    array = _to_flax_layout(path, found[name], want.shape)
    if array.shape == want.shape:
      params[path] = np.ascontiguousarray(array, want.dtype)
    else:
      problems.append(f"{name} is {array.shape}, the configuration says {want.shape}")
  if problems:
    raise UserError(f"{where} does not fit its configuration: " + "; ".join(problems))
  return flax.traverse_util.unflatten_dict(params)
