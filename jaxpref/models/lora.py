"""LoRA: low-rank additions to a network's layers in the place of training all of them.

Hu et al., 2021 (https://arxiv.org/abs/2106.09685): a layer's kernel W becomes
W + (alpha / rank) A B, of which only A and B are trained. `Adapted` stands wherever a
network's parameters do, so that nothing else needs to know; the base is there once, and is
its own reference.
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
from jaxpref.models.convert import cast, to_torch_layout, torch_name


@flax.struct.dataclass
class Adapted:
  """Parameters of a network with additions.

  Attributes:
    base: the network's own, frozen.
    lora: by module, 'down' (A) [in, rank] and 'up' (B) [rank, out], of a convolution
      [h, w, in, rank] and [1, 1, rank, out]; float32.
    scale: alpha / rank.
  """

  base: Any
  lora: Any
  scale: float = flax.struct.field(pytree_node=False)


def check_rank(params: Mapping[str, Any], *, rank: int, targets: str) -> None:
  """Refuses a rank that none of the layers' own kernels has, see `init_lora`.

  Raises:
    UserError: it is one.
  """
  shapes = _kernels(params, targets).values()
  largest = max(min(math.prod(shape[:-1]), shape[-1]) for shape in shapes)
  if rank > largest:
    raise UserError(
      f"lora.rank = {rank} exceeds {largest}, the largest rank of the layers that lora.targets "
      "matches"
    )


def _kernels(params: Mapping[str, Any], targets: str) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Shapes of the kernels of the layers that are meant, by the layers' paths, sorted."""
  try:
    wanted = re.compile(targets)
  except re.error as error:
    raise UserError(f"lora.targets {targets!r} is no regular expression: {error}") from error
  flat = flax.traverse_util.flatten_dict(params)
  kernels = {p[:-1]: leaf.shape for p, leaf in flat.items() if p[-1] == "kernel"}
  chosen = [module for module in sorted(kernels) if wanted.search(_module_name(module))]
  if not chosen:
    raise UserError(f"lora.targets {targets!r} matches no layer of the network")
  return {module: kernels[module] for module in chosen}


def init_lora(params: Mapping[str, Any], *, rank: int, targets: str, key: jax.Array) -> Any:
  """Additions that are zero so far: A uniform as in PyTorch's linear layer, B zero.

  Args:
    params: of the network, arrays or shapes.
    rank: of the additions.
    targets: a regular expression, searched for in the PyTorch names of the network's
      modules, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`.
    key: for A.

  Raises:
    UserError: no layer is meant, or the expression is none.
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
  """Plain parameters of the same function; what is no `Adapted` stays as it is."""
  if not isinstance(params, Adapted):
    return params
  flat = flax.traverse_util.flatten_dict(params.base)
  for module, (down, up) in _layers(params.lora).items():
    kernel = flat[(*module, "kernel")]
    added = params.scale * (down @ jnp.reshape(up, up.shape[-2:]))
    flat[(*module, "kernel")] = kernel + added.astype(kernel.dtype)
  return flax.traverse_util.unflatten_dict(flat)


def interceptor(scale: float):
  """Adds, to the output of each layer that has them, its additions'; for flax modules."""

  def add(next_fun, args, kwargs, context: nn.module.InterceptorContext):
    module = context.module
    out = next_fun(*args, **kwargs)
    layer = isinstance(module, nn.Dense | nn.Conv) and context.method_name == "__call__"
    if not layer or not module.has_variable("lora", "down"):
      return out
    down: jax.Array = module.get_variable("lora", "down")
    up: jax.Array = module.get_variable("lora", "up")
    # The same layer, with its strides and padding, onto fewer features.
    narrow = module.clone(features=down.shape[-1], use_bias=False, parent=None)
    hidden: Any = narrow.apply({"params": {"kernel": down}}, *args, **kwargs)
    wide = up.reshape(up.shape[-2:]).astype(out.dtype)
    return out + scale * (hidden.astype(out.dtype) @ wide)

  return add


def export_tensors(params: Adapted, dtype: Any) -> dict[str, np.ndarray]:
  """Names a UNet's additions as kohya's scripts do, for ComfyUI, A1111 and diffusers.

  A is `lora_unet_<module>.lora_down.weight`, B `.lora_up.weight` and alpha, a scalar,
  `.alpha`, with the module's PyTorch name written with underscores. All three programs
  multiply B A by alpha / rank.

  Args:
    params: with the additions; their base is of no account.
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


def export_metadata(params: Adapted, *, family: str) -> dict[str, str]:
  """Describes the file of `export_tensors` in kohya's words, by which A1111 lists it.

  Args:
    params: with the additions.
    family: the base's, see `single_file.family_of`.
  """
  rank = next(iter(_layers(params.lora).values()))[0].shape[-1]
  versions = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
  return {
    "ss_base_model_version": versions[family],
    "ss_v2": str(family == "sd2"),
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
