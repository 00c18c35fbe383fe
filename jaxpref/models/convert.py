"""Parameter trees of diffusers' and transformers' Flax modules to PyTorch's names, and back.

PyTorch is not needed: tensors are numpy arrays from and for safetensors. What a Flax module
calls `down_blocks_0/resnets_1/conv1/kernel` [kh, kw, in, out] is PyTorch's
`down_blocks.0.resnets.1.conv1.weight` [out, in, kh, kw].
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.weights import StoredTensor

_log = logging.getLogger(__name__)

# Flax joins list indices by underscore; these are the lists (conv1, linear_1 are names).
_LISTS = re.compile(
  r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
  r"|to_out|net)_(\d+)"
)
# Names of the VAE's attention as diffusers writes them since 0.14, by Flax's names, which
# are those of older files, Stable Diffusion 1.x's among them.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Safetensors' names of what numpy and ml_dtypes know as floats of two bytes and more.
_FLOATS = ("F64", "F32", "F16", "BF16")
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
  """A Flax tree as PyTorch tensors by name, contiguous, in `dtype`.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  tensors = {}
  for path, leaf in flax.traverse_util.flatten_dict(params).items():
    array = to_torch_layout(path, np.asarray(jax.device_get(leaf)))
    tensors[torch_name(path)] = cast(torch_name(path), array, dtype)
  return tensors


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
  """A tensor to be written, contiguous, in `dtype`; `name` is for the message.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  with np.errstate(over="ignore"):
    out = np.ascontiguousarray(array, dtype)
  if np.isinf(out).sum() > np.isinf(array).sum():
    raise UserError(
      f"{name} has weights too large for {np.dtype(dtype).name}; write them in bfloat16 or "
      "float32"
    )
  return out


def import_tensors(
  tensors: Mapping[str, StoredTensor],
  abstract: Mapping[str, Any],
  *,
  where: str,
  place: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, array: array,
) -> tuple[dict[str, Any], str]:
  """PyTorch tensors as the Flax tree `abstract`, in its dtypes.

  Names and shapes are checked before anything is read; then one tensor at a time is read,
  turned and placed, so that the host never holds more than that one besides what is placed.

  Args:
    tensors: by PyTorch's names.
    abstract: tree of `jax.ShapeDtypeStruct`, as `jax.eval_shape` of the module's init.
    where: named in messages.
    place: (path, array) -> leaf, such as to put it on devices.

  Returns:
    The tree, and a digest that changes with any name or stored value.

  Raises:
    UserError: tensors are missing, left over, or of another shape; names them all.
  """
  flat = flax.traverse_util.flatten_dict(abstract)
  names = {torch_name(path): path for path in flat}
  found: dict[str, StoredTensor] = {}
  for name, tensor in tensors.items():
    if name not in _IGNORED and found.setdefault(_current_name(name), tensor) is not tensor:
      raise UserError(f"{where} holds {_current_name(name)} twice, by its old and its new name")
  if odd := [f"{n} ({a.dtype})" for n, a in found.items() if a.dtype not in _FLOATS]:
    raise UserError(f"{where} holds tensors of a kind that is not read: {', '.join(odd[:3])}")
  check_tensors({n: a.shape for n, a in found.items()}, abstract, where=where)
  digest = hashlib.sha256()
  params, bad = {}, {}
  for name in sorted(names):
    path, want = names[name], flat[names[name]]
    stored = found[name].read()
    digest.update(f"{name} {stored.dtype} ".encode())
    digest.update(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
    array = np.ascontiguousarray(_to_flax_layout(path, stored, want.shape), want.dtype)
    if count := array.size - int(np.isfinite(array).sum()):
      bad[name] = count
    params[path] = place(path, array)
  if bad:
    first = ", ".join(f"{n} ({c})" for n, c in list(bad.items())[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    _log.warning(
      "%s: %d values in %d tensors are not finite: %s%s",
      *(where, sum(bad.values()), len(bad), first, more),
    )
  return flax.traverse_util.unflatten_dict(params), digest.hexdigest()


def check_tensors(
  shapes: Mapping[str, tuple[int, ...]], abstract: Mapping[str, Any], *, where: str
) -> None:
  """Whether PyTorch tensors of these shapes fill the Flax tree `abstract` exactly.

  Args:
    shapes: by PyTorch's names of today.
    abstract: as for `import_tensors`.
    where: named in the error.

  Raises:
    UserError: tensors are missing, left over, or of another shape; names them all.
  """
  wanted = {
    torch_name(path): torch_shape(path, leaf.shape)
    for path, leaf in flax.traverse_util.flatten_dict(abstract).items()
  }
  problems = [f"missing {n} {wanted[n]}" for n in sorted(wanted - shapes.keys())]
  problems += [f"surplus {n} {shapes[n]}" for n in sorted(shapes.keys() - wanted.keys())]
  problems += [
    f"{name} is {shapes[name]}, the configuration says {wanted[name]}"
    for name in sorted(wanted.keys() & shapes.keys())
    if _squeezed(shapes[name]) != _squeezed(wanted[name])
  ]
  if problems:
    raise UserError(f"{where} does not fit its configuration: " + "; ".join(problems))


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a Flax parameter in PyTorch's order of axes."""
  if path[-1] != "kernel":
    return tuple(shape)
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(reversed(shape))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A linear layer's shape for that of a 1 x 1 convolution, which may stand for it."""
  return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
