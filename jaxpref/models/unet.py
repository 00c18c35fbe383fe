"""diffusers' Flax UNet as a pure function, the one place that applies it."""

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
# What a text says to a UNet, a row a prompt: 'text' [B, L, D], and for SDXL 'pooled' [B, P]
# and 'time_ids' [B, 6]: original height and width, top and left of the crop, target height
# and width, in pixels. An improver is also shown an 'image', clean latents [B, C, h, w].
Cond = Mapping[str, Any]
# (params, x_t [B, C, H, W], t [B], cond) -> prediction [B, C, H, W]
Denoise = Callable[[Params, jax.Array, jax.Array, Cond], jax.Array]

# Switches of PyTorch's class that the Flax module lacks, and the value it has built in.
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
# All fields of either library's class: what a configuration may hold without a warning.
FIELDS = frozenset(FlaxUNet2DConditionModel.__dataclass_fields__) | set(_SUPPORTED)
FIELDS |= {"upcast_attention"}  # attention's softmax is in float32 anyway
_ONE_FOR_ALL = ("cross_attention_dim", "layers_per_block", "sample_size")


def build_unet(config: Mapping[str, Any], *, dtype: Any) -> Any:
  """The UNet of a diffusers `unet/config.json`, without parameters.

  Args:
    config: the file's contents; names that neither library knows are ignored, as
      diffusers does.
    dtype: of the computation; parameters are float32 whatever it is.

  Raises:
    UserError: the configuration asks for what the Flax module cannot do.
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
  if fields.get("sample_size") is None:  # as diffusers' pipelines without it
    fields["sample_size"] = 128 if config.get("addition_embed_type") == "text_time" else 64
  return FlaxUNet2DConditionModel(**{**fields, "dtype": dtype})


def module_fields(
  module: Any, config: Mapping[str, Any], one_for_all: Sequence[str] = ()
) -> dict[str, Any]:
  """The fields of a Flax module that a configuration states, as the module takes them.

  Args:
    module: its class.
    config: of PyTorch's class.
    one_for_all: fields that may be lists there, of a value for each block or axis; here all
      values must be one.

  Raises:
    UserError: a whole number is something else; names the field.
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
      raise UserError(f"{name} is {config_files.brief(value)}, not a whole number")
    # JSON has lists where flax wants hashable fields.
    fields[name] = tuple(value) if isinstance(value, list) else value
  return fields


def refuse_unsupported(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
  """Raises a UserError that names fields of `config` with another value than `supported`."""
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
  """The UNet's forward pass as `denoise(params, x_t, t, cond)`.

  Policy and reference both go through this function, in one program: other kernels for
  either would drown the margin between them in rounding. `params` may be `lora.Adapted`.

  Args:
    unet: from `build_unet`.
    attention: 'stock', 'xla', 'cudnn' or 'splash', see `kernels.dot_product_attention`, or
      'auto', see `kernels.resolve_attention`.
    norm: 'stock', 'lean' (`interceptors.lean_norm`), or 'auto', which is 'stock' on CPUs.
    remat: of `interceptors.REMAT`.
    mesh: whose devices the rows are split over, for kernels that XLA cannot split, and
      parameters, if `fsdp` has several: those are gathered, in the dtype of the computation.
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
    # Interceptors live on a global stack that is read while tracing, hence inside.
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
  """Shapes of what a UNet is told, float32 here, for so many rows.

  Args:
    modules: of a pipeline.
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
  """Parameters as they are when they are not trained, or not now: their kernels in `dtype`.

  A computation in the same dtype rounds kernels to it on their way into each layer: its
  outputs stay the same, bit for bit. Scales of norms, which it does not round, stay, too.
  """
  return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


def widen_input(params: Mapping[str, Any], channels: int) -> dict[str, Any]:
  """Parameters of a UNet that also reads further input channels, and makes nothing of them.

  The improver's surgery: the weights of the new channels are zero, so that the output is
  the original's whatever they hold, until training says otherwise.

  Args:
    params: of the UNet.
    channels: of the input then, those of today included; those come first.

  Raises:
    ValueError: it has as many channels already.
  """
  kernel = params["conv_in"]["kernel"]  # [3, 3, in, out]
  if (more := channels - kernel.shape[2]) < 1:
    raise ValueError(f"the UNet reads {kernel.shape[2]} channels, cannot widen to {channels}")
  wide = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
  return {**params, "conv_in": {**params["conv_in"], "kernel": wide}}
