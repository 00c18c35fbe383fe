"""Denoisers as pure functions: sharded parameters and LoRA, the same for every network."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.models import convolution, lora

Params = Mapping[str, Any]
# A denoiser's conditioning, one row per prompt. Every family has 'text' [B, L, D]; some have
# 'pooled' [B, P], a 'mask' [B, L] of the text, or SDXL's 'time_ids' [B, 6]: original height and
# width, top and left of the crop, target height and width, in pixels. An improver also gets an
# 'image', clean latents [B, C, h, w].
Cond = Mapping[str, Any]
# (params, x_t [B, C, H, W], t [B], cond) -> prediction [B, C, H, W]
Denoise = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]
# The same arguments -> features of its first layers, [B, H, W, C] each.
Encode = Callable[[Params, jax.Array, jax.Array, Cond], Sequence[jax.Array]]


def make_denoise(
  apply: Callable[[Mapping[str, Any], jax.Array, jax.Array, Cond], jax.Array],
  *,
  dtype: Any,
  mesh: Mesh | None = None,
  unrounded: Collection[str] = (),
  tables: Collection[str] = (),
  interceptors: Sequence[Callable] = (),
) -> Denoise:
  """Makes a network's forward pass a function of parameters, which may be `lora.Adapted`.

  Policy and reference both use this function, in one program. With different kernels, rounding
  differences would exceed the margin between them.

  Args:
    apply: (variables, x_t, t, cond) -> prediction; `variables` are those of flax's `apply`.
    dtype: of the computation.
    mesh: the mesh that rows and parameters are sharded over. FSDP parameters are gathered, in
      `dtype`.
    unrounded: see `freeze`.
    tables: names of parameters that are not gathered, because the network looks up a part of
      them.
    interceptors: of flax, around every call; the outermost first.
  """

  def gathered(params):
    if mesh is None or mesh.shape["fsdp"] == 1:
      return params
    used = split_fixed(params, tables)[0]
    whole = sharding.gather_params(freeze(used, dtype, unrounded), mesh)
    return join_fixed(whole, params, tables)

  def denoise(params, x_t, t, cond):
    adapted = isinstance(params, lora.Adapted)
    variables = {"params": gathered(params.base if adapted else params)}
    if adapted:
      variables["lora"] = gathered(params.lora)
    # The stack of interceptors is global and read during tracing, so it is set inside.
    with contextlib.ExitStack() as stack:
      added = [lora.interceptor(params.scale)] if adapted else []
      for interceptor in (*interceptors, *added):
        stack.enter_context(nn.intercept_methods(interceptor))
      stack.enter_context(convolution.fast_in_loops(sharding.platform_of(mesh)))
      return apply(variables, x_t, t, cond)

  return denoise


def freeze(params: Params, dtype: Any, unrounded: Collection[str] = ()) -> Any:
  """Casts kernels to `dtype`; norm scales and biases stay float32.

  Layers that compute in `dtype` would cast their kernels to it anyway, so their outputs are the
  same bit for bit. Layers do not cast norm scales and biases.

  Args:
    params: a network's parameters, arrays or shapes.
    dtype: of the frozen kernels.
    unrounded: names of other parameters that stay float32, such as tables of embeddings.
  """

  def cast(path, x):
    exempt = x.ndim < 2 or path[-1].key in unrounded
    return x if exempt else x.astype(dtype)

  return jax.tree.map_with_path(cast, params)


def split_fixed(params: Params, fixed: Collection[str]) -> tuple[Any, Any]:
  """Splits parameters into those that are trained and those that are not.

  Args:
    params: a network's parameters, arrays or shapes.
    fixed: names of parameters that are not trained, see `Family`.
  """
  flat = flax.traverse_util.flatten_dict(params)
  parts = [{p: x for p, x in flat.items() if (p[-1] in fixed) is of} for of in (False, True)]
  trained, kept = map(flax.traverse_util.unflatten_dict, parts)
  return trained, kept


def join_fixed(trained: Params, base: Params, fixed: Collection[str]) -> Any:
  """Returns all parameters of a network, of which the fixed ones are the base's."""
  kept = split_fixed(base, fixed)[1]
  flat = (flax.traverse_util.flatten_dict(tree) for tree in (trained, kept))
  return flax.traverse_util.unflatten_dict({p: x for tree in flat for p, x in tree.items()})


def widen_input(params: Params, layer: str, channels: int) -> dict[str, Any]:
  """Appends zero-initialized input channels to a convolution; outputs do not change.

  The improver's additional channels have zero weights, so they have no influence on the output
  before training.

  Args:
    params: the denoiser's parameters.
    layer: name of the convolution that reads the latents.
    channels: number of input channels after the change; the existing ones come first.

  Raises:
    ValueError: the layer has as many channels already.
  """
  kernel = params[layer]["kernel"]  # [h, w, in, out]
  if (more := channels - kernel.shape[2]) < 1:
    raise ValueError(f"{layer} reads {kernel.shape[2]} channels, cannot widen to {channels}")
  wide = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
  return {**params, layer: {**params[layer], "kernel": wide}}
