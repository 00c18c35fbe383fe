"""What is changed inside diffusers' Flax modules, from outside, with flax interceptors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers.models.attention_flax import FlaxGEGLU, FlaxTransformer2DModel


def exact_gelu(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """GEGLU with the exact GELU that PyTorch trained with; the stock module's is tanh's."""
  module = context.module
  if not (isinstance(module, FlaxGEGLU) and context.method_name == "__call__"):
    return next_fun(*args, **kwargs)
  hidden, gate = jnp.split(module.proj(args[0]), 2, axis=2)
  return module.dropout_layer(
    hidden * jax.nn.gelu(gate, approximate=False),
    deterministic=kwargs.get("deterministic", True),
  )


def transformer_norm(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  """A spatial transformer's GroupNorm with PyTorch's epsilon; the stock module's is 1e-5."""
  module = context.module
  if not (
    isinstance(module, nn.GroupNorm) and isinstance(module.parent, FlaxTransformer2DModel)
  ):
    return next_fun(*args, **kwargs)
  return module.clone(epsilon=1e-6, parent=None).apply(module.variables, *args, **kwargs)
