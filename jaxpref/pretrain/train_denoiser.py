"""The second pretraining stage: text encoder and UNet, on the VAE's latents."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.models import text
from jaxpref.models import unet as unet_lib
from jaxpref.training import optimizer as optimizer_lib


@flax.struct.dataclass
class DenoiserState:
  """Parameters {'unet', 'text_encoder'}, EMA weights, optimizer state, completed updates."""

  params: Any
  ema: Any
  opt_state: Any
  update: jax.Array


def unet_config(settings: Any) -> dict[str, Any]:
  """Returns diffusers' `unet/config.json` for the shapes world."""
  blocks = ["CrossAttn" if attend else "" for attend in settings.unet.attention]
  return {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    # diffusers' historical name for the number of heads.
    "attention_head_dim": list(settings.unet.heads),
    "block_out_channels": list(settings.unet.channels),
    "center_input_sample": False,
    "cross_attention_dim": settings.text.width,
    "down_block_types": [f"{b}DownBlock2D" for b in blocks],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": settings.vae.latent_channels,
    "layers_per_block": settings.unet.layers_per_block,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": settings.vae.latent_channels,
    "sample_size": settings.corpus.image_size // 2 ** (len(settings.vae.channels) - 1),
    "up_block_types": [f"{b}UpBlock2D" for b in reversed(blocks)],
  }


def text_config(settings: Any, *, vocab_size: int) -> dict[str, Any]:
  """Returns transformers' `text_encoder/config.json` for the shapes world."""
  return {
    "_class_name": "CLIPTextModel",
    "architectures": ["CLIPTextModel"],
    "bos_token_id": vocab_size - 2,
    "eos_token_id": vocab_size - 1,
    "hidden_act": "quick_gelu",
    "hidden_size": settings.text.width,
    "intermediate_size": 4 * settings.text.width,
    "max_position_embeddings": settings.tokenizer.max_length,
    "model_type": "clip_text_model",
    "num_attention_heads": settings.text.heads,
    "num_hidden_layers": settings.text.layers,
    "pad_token_id": vocab_size - 1,
    "projection_dim": settings.text.width,
    "vocab_size": vocab_size,
  }


def init_text_encoder(encoder: Any, key: jax.Array) -> Any:
  """Initializes parameters: token embeddings of std 1, position embeddings of std 0.3.

  The module's own embeddings have std 0.01. The layers' outputs would then be far larger:
  all tokens look the same after the last normalization, and training seldom recovers.
  """
  flat = flax.traverse_util.flatten_dict(text.init_text_encoder(encoder, key))
  sizes = {"token_embedding": 1.0, "position_embedding": 0.3}
  flat = {k: v * (sizes[k[-2]] / v.std()) if k[-2] in sizes else v for k, v in flat.items()}
  return flax.traverse_util.unflatten_dict(flat)


def scheduler_config(settings: Any) -> dict[str, Any]:
  """Returns diffusers' `scheduler/scheduler_config.json`, with Stable Diffusion's schedule."""
  return {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": settings.unet.prediction_type,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "timestep_spacing": "leading",
  }


def make_denoiser_step(
  unet: Any,
  encoder: Any,
  schedule: schedule_lib.NoiseSchedule,
  tx: optax.GradientTransformation,
  empty_ids: jax.Array,
  key: jax.Array,
  *,
  prompt_dropout: float,
  ema_decay: float,
) -> Callable:
  """Makes `step(state, latents [B, C, h, w], ids [B, L]) -> (state, metrics)`, donated."""
  denoise = unet_lib.make_denoise(unet)

  def loss(params, latents, ids, key):
    keys = dict(zip(("drop", "t", "eps"), jax.random.split(key, 3), strict=True))
    rows = latents.shape[0]
    drop = jax.random.bernoulli(keys["drop"], prompt_dropout, (rows, 1))
    ids = jnp.where(drop, empty_ids, ids)
    # One timestep from each of B equal intervals lowers the variance of the gradient. Rows come
    # in the order of the data, so the intervals are permuted.
    slot_key, place_key = jax.random.split(keys["t"])
    slots = jax.random.permutation(slot_key, rows)
    share = (slots + jax.random.uniform(place_key, (rows,))) / rows
    t = (share * schedule.alpha_bar.shape[0]).astype(jnp.int32)
    eps = jax.random.normal(keys["eps"], latents.shape)
    cond = text.encode_text(encoder, params["text_encoder"], ids)
    x_t = schedule_lib.add_noise(schedule, latents, eps, t)
    prediction = denoise(params["unet"], x_t, t, {"text": cond})
    target = schedule_lib.target(schedule, latents, eps, t)
    return schedule_lib.denoising_error(prediction, target).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, latents, ids):
    value, grads = jax.value_and_grad(loss)(
      state.params, latents, ids, jax.random.fold_in(key, state.update)
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optimizer_lib.update_ema(state.ema, params, state.update, decay=ema_decay)
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads)}
    return DenoiserState(params, ema, opt_state, state.update + 1), metrics

  return step
