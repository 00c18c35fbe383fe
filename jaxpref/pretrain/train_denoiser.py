"""The second pretraining stage: text encoders and denoiser, on the VAE's latents."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref.diffusion import flow, levels
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import denoiser as denoiser_lib
from jaxpref.models.families.family import Family
from jaxpref.pretrain import fit


def make_schedule(family: Family, scheduler: Mapping[str, Any], noise: Any) -> Any:
  """Makes the schedule of training levels.

  Args:
    family: of the base.
    scheduler: the contents of `scheduler_config.json`.
    noise: the configuration's section, of flow matching.

  Raises:
    UserError: a setting of them is invalid or has no effect.
  """
  schedule = family.scheduler.read(scheduler)
  density = flow.Density(noise.density, noise.mean, noise.std, noise.scale)
  if not isinstance(schedule, flow.FlowSchedule) and noise.shift != 1:
    raise UserError("noise.shift is for unet.prediction_type = 'flow_prediction'")
  return levels.training_schedule(schedule, density)


def make_denoiser_step(
  family: Family,
  modules: Mapping[str, Any],
  schedule: schedule_lib.Schedule,
  tx: optax.GradientTransformation,
  empty_ids: Sequence[jax.Array],
  key: jax.Array,
  *,
  fixed: Any,
  prompt_dropout: float,
  ema_decay: float,
) -> Callable:
  """Makes the jitted update of a `fit.State`, which it donates.

  `step(state, latents [B, C, h, w], ids) -> (state, metrics)`.

  Args:
    family: of the base.
    modules: by part.
    schedule: with the density of training levels.
    tx: the optimizer.
    empty_ids: token ids [1, L] of the empty prompt, by tokenizer; `ids` are such, [B, L].
    key: of all random numbers.
    fixed: the denoiser's parameters that are not trained, see `Family`.
    prompt_dropout: share of rows that are trained with the empty prompt.
    ema_decay: limit of the EMA's decay.
  """
  denoise = family.make_denoise(modules[family.denoiser])

  def loss(params, latents, ids, key):
    keys = dict(zip(("drop", "t", "eps"), jax.random.split(key, 3), strict=True))
    rows = latents.shape[0]
    drop = jax.random.bernoulli(keys["drop"], prompt_dropout, (rows, 1))
    ids = [jnp.where(drop, empty, of) for empty, of in zip(empty_ids, ids, strict=True)]
    # One level from each of B equally likely intervals lowers the variance of the gradient.
    # Rows come in the order of the data, so the intervals are permuted.
    slot_key, place_key = jax.random.split(keys["t"])
    slots = jax.random.permutation(slot_key, rows)
    share = (slots + jax.random.uniform(place_key, (rows,))) / rows
    t = levels.level_at(schedule, share)
    eps = jax.random.normal(keys["eps"], latents.shape)
    cond = family.encode(modules, params, ids, clip_skip=0)
    x_t = schedule_lib.add_noise(schedule, latents, eps, t)
    given = schedule_lib.timestep_input(schedule, t)
    network = denoiser_lib.join_fixed(params[family.denoiser], fixed, family.fixed)
    prediction = denoise(network, x_t, given, cond)
    target = schedule_lib.target(schedule, latents, eps, t)
    return schedule_lib.denoising_error(prediction, target).mean()

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, latents, ids):
    value, grads = jax.value_and_grad(loss)(
      state.params, latents, ids, jax.random.fold_in(key, state.update)
    )
    metrics = {"loss": value, "grad_norm": optax.global_norm(grads)}
    return fit.apply_gradients(state, grads, tx, ema_decay=ema_decay), metrics

  return step
