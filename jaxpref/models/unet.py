"""diffusers' Flax UNet as a pure function. Only this module applies it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers import FlaxUNet2DConditionModel
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.errors import UserError
from jaxpref.models import config_files, interceptors, kernels, lora

Params = Mapping[str, Any]
# The UNet's conditioning, one row per prompt: 'text' [B, L, D], and for SDXL 'pooled' [B, P]
# and 'time_ids' [B, 6]: original height and width, top and left of the crop, target height
# and width, in pixels. An improver also gets an 'image', clean latents [B, C, h, w].
Cond = Mapping[str, Any]
# (params, x_t [B, C, H, W], t [B], cond) -> prediction [B, C, H, W]
Denoise = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]

# Options of PyTorch's class that the Flax module lacks, and the value that it implements.
_SUPPORTED = {
  "act_fn": "silu",
  "attention_type": "default",
  "center_input_sample": False,
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_norm": None,
  "downsample_padding": 1,
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "mid_block_only_cross_attention": None,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-5,
  "norm_num_groups": 32,
  "num_attention_heads": None,
  "num_class_embeds": None,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "reverse_transformer_layers_per_block": None,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
}

_BLOCKS = {
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Fields of PyTorch's or Flax's class: known fields of a configuration; others cause a warning.
FIELDS = frozenset(FlaxUNet2DConditionModel.__dataclass_fields__) | set(_SUPPORTED)
FIELDS |= {"upcast_attention"}  # attention's softmax is always in float32
_ONE_FOR_ALL = ("cross_attention_dim", "layers_per_block", "sample_size")


def build_unet(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """Builds the UNet of a diffusers `unet/config.json`, without parameters.

  Args:
    config: the file's contents; fields that neither class has are ignored, as in diffusers.
    dtype: of the computation; parameters are always float32.

  Raises:
    UserError: the Flax module does not support the configuration.
  """
  refuse_unsupported(config, _SUPPORTED)
  for field, blocks in _BLOCKS.items():
    given = config.get(field) or blocks[0]
    for name in [given] if isinstance(given, str) else given:
      if name not in blocks:
        raise UserError(
          f"{field}: {config_files.brief(name)} is not one of {', '.join(blocks)}"
        )
  fields = module_fields(FlaxUNet2DConditionModel, config, _ONE_FOR_ALL)
  if fields.get("sample_size") is None:  # the default of diffusers' pipelines
    fields["sample_size"] = 128 if config.get("addition_embed_type") == "text_time" else 64
  return FlaxUNet2DConditionModel(**{**fields, "dtype": dtype})


def module_fields(
  module: Any, config: Mapping[str, Any], one_for_all: Sequence[str] = ()
) -> dict[str, Any]:
  """Returns the fields of a Flax module that a configuration sets, converted for the module.

  Args:
    module: the Flax class.
    config: fields of PyTorch's class.
    one_for_all: fields that may be lists in `config`, with one value per block or axis; all
      values must be equal.

  Raises:
    UserError: an integer field has another type; the message names the field.
  """
  known, fields = module.__dataclass_fields__, {}
  for name in config.keys() & known.keys():
    value = config[name]
    if name in one_for_all and isinstance(value, list):
      if len({repr(v) for v in value}) != 1:
        raise UserError(
          f"{name} is {config_files.brief(value)}: only equal values are supported"
        )
      value = value[0]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (
      known[name].type in ("int", int) and not whole and (value, name) != (None, "sample_size")
    ):
      raise UserError(f"{name} must be a whole number (got {config_files.brief(value)})")
    # flax needs hashable fields, and JSON has lists.
    fields[name] = tuple(value) if isinstance(value, list) else value
  return fields


def refuse_unsupported(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
  """Raises a UserError if fields of `config` have other values than `supported`; names them."""
  others = {
    k: config[k]
    for k, v in supported.items()
    if k in config and config[k] != v and not (v in (None, False) and not config[k])
  }
  if others:
    given = ", ".join(
      f"{k} = {config_files.brief(v)} (only {supported[k]!r})" for k, v in others.items()
    )
    raise UserError(f"diffusers' Flax modules do not support {given}")


def make_denoise(
  unet: nn.Module,
  *,
  attention: str = "auto",
  norm: str = "auto",
  remat: str = "none",
  mesh: Mesh | None = None,
) -> Denoise:
  """Returns the UNet's forward pass as `denoise(params, x_t, t, cond)`.

  Policy and reference both use this function, in one program. With different kernels, rounding
  differences would exceed the margin between them. `params` may be `lora.Adapted`.

  Args:
    unet: from `build_unet`.
    attention: 'stock', 'xla', 'cudnn' or 'splash', see `kernels.dot_product_attention`, or
      'auto', see `kernels.resolve_attention`.
    norm: 'stock', 'lean' (`interceptors.lean_norm`), or 'auto', which is 'stock' on CPUs.
    remat: a key of `interceptors.REMAT`.
    mesh: the mesh that rows and parameters are sharded over. Kernels that XLA cannot shard need
      it, and FSDP parameters are gathered, in the dtype of the computation.
  """
  platform = jax.default_backend()
  attention = kernels.resolve_attention(attention, platform)
  if norm == "auto":
    norm = "stock" if platform == "cpu" else "lean"

  def gathered(params):
    if mesh is None or mesh.shape["fsdp"] == 1:
      return params
    return sharding.gather_params(freeze(params, unet.dtype), mesh)

  def denoise(params, x_t, t, cond):
    adapted = isinstance(params, lora.Adapted)
    variables = {"params": gathered(params.base if adapted else params)}
    if adapted:
      variables["lora"] = params.lora
    added = None
    if "image" in cond:
      x_t = jnp.concatenate([x_t, cond["image"].astype(x_t.dtype)], axis=1)
    if "pooled" in cond:
      added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    # The stack of interceptors is global and read during tracing, so it is set inside.
    with contextlib.ExitStack() as stack:
      for interceptor in (  # the outermost first
        *([interceptors.remat(remat)] if remat != "none" else []),
        *([interceptors.lean_norm] if norm == "lean" else [interceptors.transformer_norm]),
        *([interceptors.attention(attention, mesh)] if attention != "stock" else []),
        interceptors.exact_gelu,
        *([lora.interceptor(params.scale)] if adapted else []),
      ):
        stack.enter_context(nn.intercept_methods(interceptor))
      return unet.apply(variables, x_t, t, cond["text"], added).sample

  return denoise


def abstract_cond(modules: Mapping[str, Any], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns abstract conditioning (float32) for a batch of `rows`.

  Args:
    modules: the pipeline's modules.
    rows: B.
  """
  shape = lambda *of: jax.ShapeDtypeStruct((rows, *of), jnp.float32)  # noqa: E731
  tokens = modules["text_encoder"].config.max_position_embeddings
  cond = {"text": shape(tokens, modules["unet"].cross_attention_dim)}
  if "text_encoder_2" in modules:
    pooled = modules["text_encoder_2"].config.projection_dim
    cond |= {"pooled": shape(pooled), "time_ids": shape(6)}
  return cond


def freeze(params: Params, dtype: Any) -> Any:
  """Casts kernels to `dtype`; norm scales and biases stay float32.

  Layers that compute in `dtype` would cast their kernels to it anyway, so their outputs are the
  same bit for bit. Layers do not cast norm scales and biases.
  """
  return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def widen_input(params: Mapping[str, Any], channels: int) -> dict[str, Any]:
  """Appends zero-initialized input channels to `conv_in`; outputs do not change.

  The improver's additional channels have zero weights, so they have no influence on the output
  before training.

  Args:
    params: the UNet's parameters.
    channels: number of input channels after the change; the existing ones come first.

  Raises:
    ValueError: the UNet has as many channels already.
  """
  kernel = params["conv_in"]["kernel"]  # [3, 3, in, out]
  if (more := channels - kernel.shape[2]) < 1:
    raise ValueError(f"the UNet reads {kernel.shape[2]} channels, cannot widen to {channels}")
  wide = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
  return {**params, "conv_in": {**params["conv_in"], "kernel": wide}}
