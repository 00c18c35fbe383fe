"""Conversion of parameters between Flax trees and PyTorch's tensors by name.

The parameters are those of diffusers' and transformers' modules. PyTorch is not needed: tensors
are numpy arrays, which safetensors files hold. The Flax parameter
`down_blocks_0/resnets_1/conv1/kernel` [kh, kw, in, out] is PyTorch's
`down_blocks.0.resnets.1.conv1.weight` [out, in, kh, kw].
"""

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax
import jax
import numpy as np

from jaxpref.errors import UserError, listed
from jaxpref.models.weights import StoredTensor

_log = logging.getLogger(__name__)

# Flax joins list indices with underscores; these are the lists (conv1, linear_1 are names).
_LISTS = re.compile(
  r"(down_blocks|up_blocks|resnets|attentions|transformer_blocks|downsamplers|upsamplers"
  r"|to_out|to_qkv_multiscale|net|block|layer|layers)_(\d+)"
)
# diffusers' names for the VAE's attention since 0.14, by the older names. Flax modules have the
# older names, and so do older files, such as those of Stable Diffusion 1.x.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# safetensors' names of the floats of two or more bytes, which numpy and ml_dtypes have.
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers in older files.
_IGNORED = ("text_model.embeddings.position_ids",)
# What PyTorch's wrappers add to module names: torch.compile, FSDP, DistributedDataParallel.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
# Tensors of a whole CLIP model that its text encoder does not use.
_OTHER_THAN_TEXT = re.compile(
  r"logit_scale|(vision_model|visual_projection|text_projection)\..+|.*\.position_ids"
)
# Tensors of a whole T5 that its encoder does not use, and a second name of its embeddings.
_OTHER_THAN_T5 = re.compile(r"(decoder\..+|lm_head\.weight)")
_T5_EMBEDDING, _T5_COPY = "shared.weight", "encoder.embed_tokens.weight"
_TEXT_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\..+")


def torch_name(path: tuple[str, ...]) -> str:
  """Returns PyTorch's name of the Flax parameter at `path`."""
  *modules, leaf = path
  parts = [_VAE_ATTENTION.get(m, _LISTS.sub(r"\1.\2", m)) for m in modules]
  leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
  return ".".join([*parts, leaf])


def _current_name(name: str) -> str:
  """Converts a tensor's name, also of old versions of diffusers, to the current one."""
  parts = [p for p in name.split(".") if p not in _WRAPPERS]
  if "attentions" in parts:
    parts = [_VAE_ATTENTION.get(p, p) for p in parts]
  return ".".join(parts)


def to_torch_layout(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """Transposes a Flax parameter to PyTorch's order of axes; returns a view."""
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
  """Converts a Flax tree to PyTorch tensors by name, contiguous, in `dtype`.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  tensors = {}
  for path, leaf in flax.traverse_util.flatten_dict(params).items():
    array = to_torch_layout(path, np.asarray(jax.device_get(leaf)))
    tensors[torch_name(path)] = cast(torch_name(path), array, dtype)
  return tensors


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
  """Casts a tensor to `dtype`, contiguous; `name` is for the error message.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  with np.errstate(over="ignore"):
    out = np.asarray(array, dtype, order="C")  # of any rank: a scalar stays one
  if np.isinf(out).sum() > np.isinf(array).sum():
    raise UserError(
      f"{name} has weights too large for {np.dtype(dtype).name}: write them in bfloat16 or "
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
  """Converts PyTorch tensors to the Flax tree `abstract`, in its dtypes.

  All names and shapes are checked before a tensor is read. Then tensors are read, transposed
  and placed one at a time, so that the host holds only one tensor that is not placed yet.

  Args:
    tensors: by PyTorch's names.
    abstract: a tree of `jax.ShapeDtypeStruct`, such as `jax.eval_shape` of the module's init.
    where: the source, for messages.
    place: (path, array) -> leaf, for example to put it on devices.

  Returns:
    The tree, and a digest that changes with any name or stored value.

  Raises:
    UserError: tensors are missing, surplus, or of another shape; names the first few.
  """
  flat = flax.traverse_util.flatten_dict(abstract)
  names = {torch_name(path): path for path in flat}
  found = _by_current_names(tensors, names, where)
  if _T5_EMBEDDING in names:
    found = _with_one_embedding(found, where)
  found = _without_surplus(found, names, where)
  if odd := [f"{n} ({a.dtype})" for n, a in found.items() if a.dtype not in _FLOATS]:
    raise UserError(
      f"{where} holds tensors of a dtype that is not supported, only floats of two or more "
      f"bytes are: {', '.join(odd[:3])}"
    )
  check_tensors({n: a.shape for n, a in found.items()}, abstract, where=where)
  digest = hashlib.sha256()
  params, bad = {}, {}
  for name in sorted(names):
    path, want = names[name], flat[names[name]]
    stored = found[name].read()
    digest.update(f"{name} {stored.dtype} ".encode())
    digest.update(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
    array = np.asarray(_to_flax_layout(path, stored, want.shape), want.dtype, order="C")
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


def _by_current_names(
  tensors: Mapping[str, StoredTensor], wanted: Collection[str], where: str
) -> dict[str, StoredTensor]:
  """Renames tensors to current names, without wrappers' parts and without a common prefix."""
  found: dict[str, StoredTensor] = {}
  for name, tensor in tensors.items():
    if found.setdefault(_current_name(name), tensor) is not tensor:
      raise UserError(f"{where} holds {_current_name(name)} twice, by its old and its new name")
  wrapped = sorted(n for n in tensors if any(part in _WRAPPERS for part in n.split(".")))
  if wrapped:
    _log.warning(
      "%s: the parts of names that PyTorch's wrappers add are ignored in %d tensors: %s",
      *(where, len(wrapped), listed(wrapped)),
    )
  if prefix := _common_prefix(found, wanted):
    _log.warning("%s: every name begins with %r, which is ignored", where, prefix)
    found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
  return found


def _with_one_embedding(found: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
  """Leaves T5's embeddings under one of their two names; a file may have either or both."""
  rest = dict(found)
  copy = rest.pop(_T5_COPY, None)
  if copy is None:
    return found
  own = rest.setdefault(_T5_EMBEDDING, copy)
  if own is not copy and (
    own.shape != copy.shape or not np.array_equal(own.read(), copy.read())
  ):
    raise UserError(f"{where} holds {_T5_EMBEDDING} and {_T5_COPY} with different values")
  return rest


def _common_prefix(names: Collection[str], wanted: Collection[str]) -> str:
  """Returns the prefix without which the names include all wanted ones, or ''."""
  first = min(wanted)
  for name in names:
    prefix = name.removesuffix(first)
    shared = prefix not in ("", name) and all(n.startswith(prefix) for n in names)
    if shared and all(prefix + w in names for w in wanted):
      return prefix
  return ""


def _without_surplus(
  found: dict[str, StoredTensor], wanted: Collection[str], where: str
) -> dict[str, StoredTensor]:
  """Drops tensors that do not influence the output, as loading in PyTorch does."""
  layers = [int(m[1]) for name in wanted if (m := _TEXT_LAYER.fullmatch(name))]

  def needless(name: str) -> bool:
    if name in wanted:
      return False
    if found[name].shape in ((), (1,)):  # counters and scales left over from training
      return True
    if _T5_EMBEDDING in wanted and _OTHER_THAN_T5.fullmatch(name):
      return True
    layer = _TEXT_LAYER.fullmatch(name)
    if layer is not None:  # the configuration skips the last layers
      return bool(layers) and int(layer[1]) > max(layers)
    return bool(layers) and _OTHER_THAN_TEXT.fullmatch(name) is not None

  left_out = sorted(filter(needless, found))
  if said := [name for name in left_out if name not in _IGNORED]:
    _log.warning(
      "%s: %d tensors that the configuration does not have are ignored: %s",
      *(where, len(said), listed(said)),
    )
  return {name: found[name] for name in found.keys() - set(left_out)}


def check_tensors(
  shapes: Mapping[str, tuple[int, ...]], abstract: Mapping[str, Any], *, where: str
) -> None:
  """Checks that PyTorch tensors of these shapes match the Flax tree `abstract` exactly.

  Args:
    shapes: by PyTorch's current names.
    abstract: Flax tree of the parameters' shapes.
    where: the source, for the error message.

  Raises:
    UserError: tensors are missing, surplus, or of another shape; names the first few.
  """
  wanted = {
    torch_name(path): torch_shape(path, leaf.shape)
    for path, leaf in flax.traverse_util.flatten_dict(abstract).items()
  }
  missing = [f"{n} {wanted[n]}" for n in sorted(wanted - shapes.keys())]
  surplus = [f"{n} {shapes[n]}" for n in sorted(shapes.keys() - wanted.keys())]
  others = [
    f"{name} is {shapes[name]}, the configuration says {wanted[name]}"
    for name in sorted(wanted.keys() & shapes.keys())
    if _squeezed(shapes[name]) != _squeezed(wanted[name])
  ]
  kinds = (("missing ", missing), ("surplus ", surplus), ("", others))
  problems = [kind + listed(names) for kind, names in kinds if names]
  if problems:
    count = f" ({len(shapes)} tensors, {len(wanted)} wanted)"
    raise UserError(f"{where} does not fit its configuration{count}: " + "; ".join(problems))


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Transposes the shape of a Flax parameter to PyTorch's order of axes."""
  if path[-1] != "kernel":
    return tuple(shape)
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else tuple(reversed(shape))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns [out, in] for a 1 x 1 convolution, which may stand for a linear layer."""
  return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
