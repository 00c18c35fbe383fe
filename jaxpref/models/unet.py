"""diffusers' Flax UNet as a pure function. Only this module applies it."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from diffusers import FlaxUNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks_flax import FlaxCrossAttnDownBlock2D
from jax.sharding import Mesh

from jaxpref.errors import UserError
from jaxpref.models import config_files, denoiser, interceptors, kernels
from jaxpref.models.denoiser import Denoise

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
# Fields without which the defaults build another network than was trained.
NEEDED = (
  *("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types"),
  *("in_channels", "layers_per_block", "out_channels", "sample_size", "up_block_types"),
)
_ONE_FOR_ALL = ("cross_attention_dim", "layers_per_block", "sample_size")
# Projections of self- and cross-attention, which LoRA usually adapts.
ATTENTION_LAYERS = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"


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


def make_denoise(unet: nn.Module, **options: Any) -> Denoise:
  """Returns the UNet's forward pass as `denoise(params, x_t, t, cond)`.

  Args:
    unet: from `build_unet`.
    **options: the keyword arguments of `as_function`.
  """

  def apply(variables, x_t, t, cond):
    if "image" in cond:
      x_t = jnp.concatenate([x_t, cond["image"].astype(x_t.dtype)], axis=1)
    out: Any = unet.apply(variables, x_t, t, cond["text"], _added(cond))
    return out.sample

  return as_function(apply, unet, **options)


def make_encode(unet: nn.Module, **options: Any) -> denoiser.Encode:
  """Returns the UNet's first half as `encode(params, x_t, t, cond)`.

  Its features are the outputs of all down blocks and of the middle block, in this order.
  `params` may lack what `encoder_params` leaves out.

  Args:
    unet: from `build_unet`.
    **options: the keyword arguments of `as_function`.
  """

  def apply(variables, x_t, t, cond):
    return unet.apply(variables, x_t, t, cond["text"], _added(cond), method=_encode)

  return as_function(apply, unet, **options)


def encoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters that `make_encode` reads."""
  second_half = ("up_blocks", "conv_norm_out", "conv_out")
  return {name: of for name, of in params.items() if not name.startswith(second_half)}


def _encode(unet: Any, x_t: Any, t: Any, text: Any, added: Any) -> tuple[jax.Array, ...]:
  """Follows the Flax module's `__call__` to the middle of the network."""
  time = unet.time_embedding(unet.time_proj(t))
  if added is not None:
    sizes = unet.add_time_proj(added["time_ids"].ravel()).reshape(len(x_t), -1)
    pooled = added["text_embeds"]
    time += unet.add_embedding(jnp.concatenate([pooled, sizes], axis=-1))
  x = unet.conv_in(x_t.transpose(0, 2, 3, 1))
  found = []
  for block in unet.down_blocks:
    attends = isinstance(block, FlaxCrossAttnDownBlock2D)
    x, _ = block(x, time, text) if attends else block(x, time)
    found.append(x)
  return *found, unet.mid_block(x, time, text)


def _added(cond: denoiser.Cond) -> dict[str, jax.Array] | None:
  """Returns what SDXL is given beside the text, None for other models."""
  if "pooled" not in cond:
    return None
  return {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}


def as_function(
  apply: Any,
  unet: nn.Module,
  *,
  attention: str = "auto",
  norm: str = "auto",
  remat: str = "none",
  mesh: Mesh | None = None,
) -> Any:
  """Makes a call of the UNet a function of its parameters, see `denoiser.make_denoise`.

  Args:
    apply: (variables, x_t, t, cond) -> result.
    unet: from `build_unet`.
    attention: 'stock', 'xla', 'cudnn' or 'splash', see `kernels.dot_product_attention`, or
      'auto', see `kernels.resolve_attention`.
    norm: 'stock', 'lean' (`interceptors.lean_norm`), or 'auto', which is 'stock' on CPUs.
    remat: a key of `interceptors.REMAT`.
    mesh: see `denoiser.make_denoise`. Kernels that XLA cannot shard need it.
  """
  platform = jax.default_backend()
  attention = kernels.resolve_attention(attention, platform)
  if norm == "auto":
    norm = "stock" if platform == "cpu" else "lean"
  return denoiser.make_denoise(
    apply,
    dtype=unet.dtype,  # type: ignore[attr-defined]
    mesh=mesh,
    interceptors=(
      *([interceptors.remat(remat)] if remat != "none" else []),
      *([interceptors.lean_norm] if norm == "lean" else [interceptors.transformer_norm]),
      *([interceptors.attention(attention, mesh)] if attention != "stock" else []),
      interceptors.exact_gelu,
    ),
  )
