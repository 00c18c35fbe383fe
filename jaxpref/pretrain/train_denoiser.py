"""The second pretraining stage: text encoder and denoiser, on the VAE's latents."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from jaxpref.diffusion import flow, levels
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import text
from jaxpref.models.families import stable_diffusion
from jaxpref.training import optimizer as optimizer_lib

FAMILY = stable_diffusion.FAMILY
# Parts that are trained together.
(ENCODER,) = FAMILY.tokenizers(FAMILY.parts)
TRAINED = (FAMILY.denoiser, ENCODER)


@flax.struct.dataclass
class DenoiserState:
  """Parameters by part, EMA weights, optimizer state, completed updates."""

  params: Any
  ema: Any
  opt_state: Any
  update: jax.Array


def denoiser_config(settings: Any) -> dict[str, Any]:
  """Returns the UNet's `config.json` for the shapes world."""
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
  """Returns the text encoder's `config.json` for the shapes world."""
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
  """Returns diffusers' `scheduler/scheduler_config.json`.

  The schedule is Stable Diffusion's, or a flow's.
  """
  solver = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "num_train_timesteps": 1000,
    "prediction_type": settings.unet.prediction_type,
    "solver_order": 2,
    "solver_type": "midpoint",
  }
  if settings.unet.prediction_type == flow.PREDICTION_TYPE:
    # diffusers' StableDiffusionPipeline runs this scheduler, and not FlowMatchEuler's.
    return solver | {"flow_shift": settings.noise.shift, "use_flow_sigmas": True}
  return solver | {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "steps_offset": 1,
    "timestep_spacing": "leading",
  }


def make_schedule(settings: Any) -> schedule_lib.Schedule:
  """Makes the schedule of training levels.

  Raises:
    UserError: a setting of them is invalid or has no effect.
  """
  noise = settings.noise
  schedule = schedule_lib.schedule_from_config(scheduler_config(settings))
  density = flow.Density(noise.density, noise.mean, noise.std, noise.scale)
  if settings.unet.prediction_type != flow.PREDICTION_TYPE and noise.shift != 1:
    raise UserError("noise.shift is for unet.prediction_type = 'flow_prediction'")
  return levels.training_schedule(schedule, density)


def make_denoiser_step(
  modules: Mapping[str, Any],
  schedule: schedule_lib.Schedule,
  tx: optax.GradientTransformation,
  empty_ids: jax.Array,
  key: jax.Array,
  *,
  prompt_dropout: float,
  ema_decay: float,
) -> Callable:
  """Makes `step(state, latents [B, C, h, w], ids [B, L]) -> (state, metrics)`, donated."""
  family = FAMILY
  denoise = family.make_denoise(modules[family.denoiser])

  def loss(params, latents, ids, key):
    keys = dict(zip(("drop", "t", "eps"), jax.random.split(key, 3), strict=True))
    rows = latents.shape[0]
    drop = jax.random.bernoulli(keys["drop"], prompt_dropout, (rows, 1))
    ids = jnp.where(drop, empty_ids, ids)
    # One level from each of B equally likely intervals lowers the variance of the gradient.
    # Rows come in the order of the data, so the intervals are permuted.
    slot_key, place_key = jax.random.split(keys["t"])
    slots = jax.random.permutation(slot_key, rows)
    share = (slots + jax.random.uniform(place_key, (rows,))) / rows
    t = levels.level_at(schedule, share)
    eps = jax.random.normal(keys["eps"], latents.shape)
    cond = family.encode(modules, params, [ids], clip_skip=0)
    x_t = schedule_lib.add_noise(schedule, latents, eps, t)
    given = schedule_lib.timestep_input(schedule, t)
    prediction = denoise(params[family.denoiser], x_t, given, cond)
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
