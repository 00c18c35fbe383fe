"""LoRA: training of low-rank additions to a network's layers, instead of all weights.

Hu et al., 2021 (https://arxiv.org/abs/2106.09685): a layer's kernel W becomes
W + (alpha / rank) A B, and only A and B are trained. `Adapted` takes the place of a network's
parameters everywhere, so other code does not depend on LoRA. The base weights exist once, and
are also the reference.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.torch_layout import cast, to_torch_layout, torch_name


@flax.struct.dataclass
class Adapted:
  """A network's parameters with low-rank additions.

  Attributes:
    base: the network's own parameters, frozen.
    lora: by module, 'down' (A) [in, rank] and 'up' (B) [rank, out]; for a convolution
      [h, w, in, rank] and [1, 1, rank, out]. float32.
    scale: alpha / rank.
  """

  base: Any
  lora: Any
  scale: float = flax.struct.field(pytree_node=False)


def check_rank(params: Mapping[str, Any], *, rank: int, targets: str, usual: str = "") -> None:
  """Refuses a rank that is larger than the rank of every targeted kernel.

  Args:
    params: as for `init_lora`.
    rank: of the additions.
    targets: as for `init_lora`.
    usual: targets to name if none of the layers match.

  Raises:
    UserError: the rank is too large, or `targets` as for `init_lora`.
  """
  shapes = _kernels(params, targets, usual).values()
  largest = max(min(math.prod(shape[:-1]), shape[-1]) for shape in shapes)
  if rank > largest:
    raise UserError(
      f"lora.rank must be at most {largest}, the largest rank of the layers that lora.targets "
      f"matches (got {rank})"
    )


def _kernels(
  params: Mapping[str, Any], targets: str, usual: str = ""
) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the kernel shapes of the targeted layers, by the layers' paths, sorted."""
  try:
    wanted = re.compile(targets)
  except re.error as error:
    raise UserError(f"lora.targets {targets!r} is not a regular expression: {error}") from error
  flat = flax.traverse_util.flatten_dict(params)
  kernels = {
    p[:-1]: leaf.shape
    for p, leaf in flat.items()
    if p[-1] == "kernel" and not _is_depthwise(leaf.shape)
  }
  chosen = [module for module in sorted(kernels) if wanted.search(_module_name(module))]
  if not chosen:
    hint = f"; usual for it are {usual!r}" if usual else ""
    raise UserError(f"lora.targets {targets!r} does not match a layer of the network{hint}")
  return {module: kernels[module] for module in chosen}


def _is_depthwise(kernel: tuple[int, ...]) -> bool:
  """Returns whether a convolution sees each channel alone: a narrower one cannot be added."""
  *window, inputs, _ = kernel
  return inputs == 1 and math.prod(window) > 1


def init_lora(params: Mapping[str, Any], *, rank: int, targets: str, key: jax.Array) -> Any:
  """Initializes additions that sum to zero: A uniform as PyTorch's linear layer, B zero.

  Args:
    params: the network's, arrays or shapes.
    rank: of the additions.
    targets: a regular expression, searched for in the PyTorch names of the network's
      modules, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`. Depthwise
      convolutions are left out.
    key: random key for A.

  Raises:
    UserError: `targets` matches no layer, or is not a regular expression.
  """
  additions = {}
  for i, (module, kernel) in enumerate(_kernels(params, targets).items()):
    *window, inputs, outputs = kernel
    bound = 1.0 / np.sqrt(inputs * np.prod(window, dtype=int))
    shape = (*window, inputs, rank)
    down = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-bound, maxval=bound)
    additions[(*module, "down")] = down
    additions[(*module, "up")] = jnp.zeros((*(1 for _ in window), rank, outputs))
  return flax.traverse_util.unflatten_dict(additions)


def merge(params: Any) -> Any:
  """Merges additions into plain parameters of the same function; returns others unchanged."""
  if not isinstance(params, Adapted):
    return params
  flat = flax.traverse_util.flatten_dict(params.base)
  for module, (down, up) in _layers(params.lora).items():
    kernel = flat[(*module, "kernel")]
    added = params.scale * (down @ jnp.reshape(up, up.shape[-2:]))
    flat[(*module, "kernel")] = kernel + added.astype(kernel.dtype)
  return flax.traverse_util.unflatten_dict(flat)


def without_additions(base: Any, params: Any) -> Any:
  """Returns the base in the structure of adapted parameters: with additions of zero.

  A program that is compiled for one then serves both.

  Args:
    base: the network's own parameters.
    params: `Adapted`, or plain parameters: then the base is returned unchanged.
  """
  if not isinstance(params, Adapted):
    return base
  return Adapted(base, jax.tree.map(jnp.zeros_like, params.lora), params.scale)


def interceptor(scale: float):
  """Returns a flax interceptor that adds the low-rank additions to layers' outputs."""

  def add(next_fun, args, kwargs, context: nn.module.InterceptorContext):
    module = context.module
    out = next_fun(*args, **kwargs)
    layer = isinstance(module, nn.Dense | nn.Conv) and context.method_name == "__call__"
    if not layer or not module.has_variable("lora", "down"):
      return out
    down: jax.Array = module.get_variable("lora", "down")
    up: jax.Array = module.get_variable("lora", "up")
    # The same layer, with its strides and padding, but with `rank` output features.
    narrow = module.clone(features=down.shape[-1], use_bias=False, parent=None)
    hidden: Any = narrow.apply({"params": {"kernel": down}}, *args, **kwargs)
    wide = up.reshape(up.shape[-2:]).astype(out.dtype)
    return out + scale * (hidden.astype(out.dtype) @ wide)

  return add


def export_tensors(params: Adapted, dtype: Any) -> dict[str, np.ndarray]:
  """Converts a UNet's additions to tensors by kohya's names, for ComfyUI, A1111 and diffusers.

  A is `lora_unet_<module>.lora_down.weight`, B `.lora_up.weight` and alpha, a scalar, `.alpha`.
  <module> is the module's PyTorch name with underscores. All three programs multiply B A by
  alpha / rank.

  Args:
    params: with the additions; the base is not used.
    dtype: of A and B; alpha is float32.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  tensors = {}
  for module, (down, up) in _layers(params.lora).items():
    stem = "lora_unet_" + _module_name(module).replace(".", "_")
    for way, array in (("down", down), ("up", up)):
      host = to_torch_layout(("kernel",), np.asarray(jax.device_get(array)))
      name = f"{stem}.lora_{way}.weight"
      tensors[name] = cast(name, host, dtype)
    tensors[f"{stem}.alpha"] = np.asarray(params.scale * down.shape[-1], np.float32)
  return tensors


def export_peft_tensors(params: Adapted, dtype: Any, *, part: str) -> dict[str, np.ndarray]:
  """Converts a transformer's additions to tensors by peft's names, for diffusers and ComfyUI.

  A is `<part>.<module>.lora_A.weight` and B `.lora_B.weight`, which is multiplied by the scale:
  diffusers refuses files of SD3 that have an alpha, and takes it to be the rank.

  Args:
    params: with the additions; the base is not used.
    dtype: of A and B.
    part: the network's name in the pipeline, such as 'transformer'.

  Raises:
    UserError: finite weights are too large for `dtype`.
  """
  tensors = {}
  for module, (down, up) in _layers(params.lora).items():
    stem = f"{part}.{_module_name(module)}"
    for letter, array in (("A", down), ("B", params.scale * up)):
      host = to_torch_layout(("kernel",), np.asarray(jax.device_get(array)))
      name = f"{stem}.lora_{letter}.weight"
      tensors[name] = cast(name, host, dtype)
  return tensors


def export_metadata(params: Adapted) -> dict[str, str]:
  """Returns the metadata of kohya's files about the additions; others name the base."""
  rank = next(iter(_layers(params.lora).values()))[0].shape[-1]
  return {
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(rank),
    "ss_network_alpha": f"{params.scale * rank:g}",
  }


def _layers(lora: Any) -> dict[tuple[str, ...], tuple[Any, Any]]:
  flat = flax.traverse_util.flatten_dict(lora)
  modules = sorted({path[:-1] for path in flat})
  return {m: (flat[(*m, "down")], flat[(*m, "up")]) for m in modules}


def _module_name(module: tuple[str, ...]) -> str:
  return torch_name((*module, "kernel")).removesuffix(".weight")
