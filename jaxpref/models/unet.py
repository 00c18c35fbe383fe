"""diffusers' Flax UNet as a pure function, the one place that applies it."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from diffusers import FlaxUNet2DConditionModel

from jaxpref.models import interceptors

Params = Mapping[str, Any]
# (params, x_t [B, C, H, W], t [B], cond [B, L, D]) -> prediction [B, C, H, W]
Denoise = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


def build_unet(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """The UNet of a diffusers `unet/config.json`, without parameters.

  Args:
    config: the file's contents; names that the module does not know are ignored, as
      diffusers does.
    dtype: of the computation; parameters are float32 whatever it is.
  """
  known = FlaxUNet2DConditionModel.__dataclass_fields__
  # JSON has lists where flax wants hashable fields.
  fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in known}
  return FlaxUNet2DConditionModel(**{**fields, "dtype": dtype})


def make_denoise(unet: nn.Module) -> Denoise:
  """The UNet's forward pass as `denoise(params, x_t, t, cond)`.

  Policy and reference both go through this function, in one program: other kernels for
  either would drown the margin between them in rounding.
  """

  def denoise(params, x_t, t, cond):
    # Interceptors live on a global stack that is read while tracing, hence inside.
    with nn.intercept_methods(interceptors.exact_gelu):
      return unet.apply({"params": params}, x_t, t, cond).sample

  return denoise
