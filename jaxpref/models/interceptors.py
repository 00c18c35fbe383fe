"""Changes inside diffusers' Flax modules, as flax interceptors.

An interceptor is (next_fun, args, kwargs, context) -> output. Parameters keep their names and
places.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models.attention_flax import (
  FlaxAttention,
  FlaxBasicTransformerBlock,
  FlaxGEGLU,
  FlaxTransformer2DModel,
)
from diffusers.models.resnet_flax import FlaxResnetBlock2D
from jax.sharding import Mesh

from jaxpref.models import kernels

Interceptor = Callable[..., Any]
# Modules recomputed in the backward pass instead of stored; later entries save more memory.
REMAT: dict[str, tuple[type[nn.Module], ...]] = {
  "none": (),
  "attention": (FlaxAttention,),
  "transformer": (FlaxBasicTransformerBlock,),
  "blocks": (FlaxBasicTransformerBlock, FlaxResnetBlock2D),
  "full": (FlaxTransformer2DModel, FlaxResnetBlock2D),
}


def exact_gelu(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """Computes GEGLU with the exact GELU, as PyTorch trained; the Flax module's is tanh's."""
  module = context.module
  if not (isinstance(module, FlaxGEGLU) and context.method_name == "__call__"):
    return next_fun(*args, **kwargs)
  hidden, gate = jnp.split(module.proj(args[0]), 2, axis=2)
  return module.dropout_layer(
    hidden * jax.nn.gelu(gate, approximate=False),
    deterministic=kwargs.get("deterministic", True),
  )


def transformer_norm(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """Applies a transformer's GroupNorm with PyTorch's epsilon, 1e-6; Flax has 1e-5."""
  module = context.module
  if not (
    isinstance(module, nn.GroupNorm) and isinstance(module.parent, FlaxTransformer2DModel)
  ):
    return next_fun(*args, **kwargs)
  return module.clone(epsilon=1e-6, parent=None).apply(module.variables, *args, **kwargs)


def patches_by_product(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """Computes a convolution of patches that do not overlap as one product of matrices.

  It is the same sum. On CPUs XLA's gradient of such a convolution takes minutes.
  """
  module = context.module
  if (
    not isinstance(module, nn.Conv)
    or context.method_name != "__call__"
    or module.is_initializing()
    or module.kernel_size != module.strides
    or module.padding != "VALID"
  ):
    return next_fun(*args, **kwargs)
  x, (height, width) = args[0], cast(tuple[int, int], module.kernel_size)
  batch, rows, columns = len(x), x.shape[1] // height, x.shape[2] // width
  x = x[:, : rows * height, : columns * width]
  x = x.reshape(batch, rows, height, columns, width, x.shape[-1]).swapaxes(2, 3)
  kernel = module.variables["params"]["kernel"]
  x = x.reshape(batch, rows, columns, -1).astype(module.dtype)
  out = x @ kernel.reshape(-1, module.features).astype(module.dtype)
  return out + module.variables["params"]["bias"].astype(out.dtype) if module.use_bias else out


def attention(kernel: str, mesh: Mesh | None = None) -> Interceptor:
  """Computes attention by `kernels.dot_product_attention`; the Flax module keeps all logits."""

  def intercept(next_fun, args, kwargs, context: nn.module.InterceptorContext):
    module = context.module
    if not (isinstance(module, FlaxAttention) and context.method_name == "__call__"):
      return next_fun(*args, **kwargs)
    hidden, source = _arguments(args, kwargs, "hidden_states", "context")
    source = hidden if source is None else source

    def by_head(x):
      return x.reshape(*x.shape[:2], module.heads, module.dim_head)

    out = kernels.dot_product_attention(
      by_head(module.query(hidden)),
      by_head(module.key(source)),
      by_head(module.value(source)),
      scale=module.scale,
      kernel=kernel,
      mesh=mesh,
    )
    out = module.proj_attn(out.reshape(*out.shape[:2], -1))
    deterministic = _arguments(args, kwargs, "hidden_states", "context", "deterministic")[2]
    return module.dropout_layer(out, deterministic=deterministic is not False)

  return intercept


def lean_norm(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """Computes group norms by `kernels.group_norm`, in residual blocks with the SiLU."""
  module = context.module
  if context.method_name != "__call__":
    return next_fun(*args, **kwargs)
  if isinstance(module, nn.GroupNorm):
    spatial = isinstance(module.parent, FlaxTransformer2DModel)
    return _norm(module, args[0], epsilon=1e-6 if spatial else None)
  if not isinstance(module, FlaxResnetBlock2D):
    return next_fun(*args, **kwargs)
  x, temb, deterministic = _arguments(args, kwargs, "hidden_states", "temb", "deterministic")
  shift = module.time_emb_proj(nn.swish(temb))[:, None, None]
  hidden = module.conv1(_norm(module.norm1, x, silu=True)) + shift
  hidden = _norm(module.norm2, hidden, silu=True)
  hidden = module.dropout(hidden, deterministic is not False)
  shortcut = module.conv_shortcut
  return module.conv2(hidden) + (x if shortcut is None else shortcut(x))


def remat(which: str) -> Interceptor:
  """Recomputes the inside of some of the UNet's modules in the backward pass.

  Args:
    which: a key of `REMAT`.
  """
  return remat_modules(REMAT[which])


def remat_modules(kinds: tuple[type[nn.Module], ...]) -> Interceptor:
  """Recomputes the inside of modules of these classes in the backward pass."""

  def intercept(next_fun, args, kwargs, context: nn.module.InterceptorContext):
    if not isinstance(context.module, kinds) or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    again = nn.remat(lambda module, *a: next_fun(*a, **kwargs))
    return again(context.module, *args)

  return intercept


def _norm(module: nn.GroupNorm, x: jax.Array, *, epsilon=None, silu=False) -> jax.Array:
  weights = module.variables["params"]
  return kernels.group_norm(
    *(x, weights["scale"], weights["bias"]),
    *(module.num_groups, module.epsilon if epsilon is None else epsilon, silu),
  )


def _arguments(args, kwargs, *names) -> list[Any]:
  """Returns arguments by position or by name; None if they are not given."""
  return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
