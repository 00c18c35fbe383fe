"""Transformers as pure functions of parameters, latents, timesteps and conditioning."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxpref.models import denoiser, kernels
from jaxpref.models.denoiser import Denoise
from jaxpref.models.dit.joint_attention import AttentionOptions

# Parameters that are tables of positions, which are never trained and never used whole.
POSITIONS = ("pos_embed",)
# Parameters that stay float32 where others are rounded; SANA's blocks have tables, too.
UNROUNDED = (*POSITIONS, "scale_shift_table")
_TAKEN = ("text", "pooled", "mask", "guidance")
# The eight projections of the joint attention, which published preference training adapts.
JOINT_LAYERS = (
  r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0"
  r"|add_q_proj|add_k_proj|add_v_proj|to_add_out)$"
)


def make_denoise(
  module: Any,
  *,
  attention: str = "auto",
  norm: str = "auto",
  remat: str = "none",
  mesh: Mesh | None = None,
) -> Denoise:
  """Returns a transformer's forward pass as `denoise(params, x_t, t, cond)`.

  The conditioning has 'text', and what the module takes of 'pooled', a 'mask' of the text, and
  'guidance' [B] for models distilled from guidance.

  Args:
    module: from `build_sd3_transformer`, `build_flux_transformer` or `build_sana_transformer`.
    attention: 'stock' or 'xla', which are the same here, 'cudnn' or 'splash', see
      `kernels.dot_product_attention`, or 'auto', see `kernels.resolve_attention`.
    norm: has no influence, because there are only layer norms.
    remat: 'none'; with any other value, the backward pass recomputes the inside of blocks.
    mesh: see `denoiser.make_denoise`. Kernels that XLA cannot shard need it.
  """
  del norm
  kernel = kernels.resolve_attention(attention, jax.default_backend())
  network = module.clone(options=AttentionOptions(kernel, mesh), remat=remat != "none")

  def apply(variables, x_t, t, cond):
    known = {name: cond[name] for name in _TAKEN if name in cond}
    return network.apply(variables, x_t, t, **known)

  return denoiser.make_denoise(
    apply, dtype=module.dtype, mesh=mesh, unrounded=UNROUNDED, tables=POSITIONS
  )
