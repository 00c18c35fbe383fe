"""The train step of DRaFT, AlignProp and ReFL: sample, decode, score, and go back.

An update samples an image for each of its prompts; the loss is a function of its reward, and
the gradient goes through scorer, decoder and the last steps of the sampler.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import rng, sharding
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler, timesteps
from jaxpref.diffusion.schedule import NoiseSchedule
from jaxpref.losses import Loss, Terms
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline
from jaxpref.rewards import pathwise
from jaxpref.training import mean_gradients
from jaxpref.training import train_step as train_step_lib
from jaxpref.training.judge import Judge


class Path(NamedTuple):
  """How an update samples, and which steps have a gradient.

  Attributes:
    method: 'last': through the last steps; 'renoised': through the last step, which several
      noises repeat; 'predicted': the prediction at a random step.
    num_steps: of the sampler, DDIM's.
    guidance: classifier-free guidance scale; at most 1: no guidance.
    eta: strength of the steps' noise.
    last: of 'last', the largest number of steps with a gradient.
    mean: of 'last', the mean of that number, if it is random; else 0.
    std: of 'last', its standard deviation; the number is rounded, and kept from 1 to `last`.
    repeats: of 'renoised', the number of noises.
    first: of 'predicted', the first step that may be chosen, from 0.
    end: of 'predicted', the step after the last that may be chosen.
  """

  method: str
  num_steps: int
  guidance: float
  eta: float
  last: int
  mean: float
  std: float
  repeats: int
  first: int
  end: int


class _Fixed(NamedTuple):
  """Inputs of the loss that have no gradient.

  Attributes:
    base: the base's parameters, or None.
    judge: the judge's.
    guide: conditioning that guidance leads away from, or None.
    chosen: from `sample_step`.
  """

  base: Any
  judge: Any
  guide: Any
  chosen: jax.Array | None


def path_of(config: ConfigDict) -> Path:
  """Returns the path that a configuration describes."""
  of, rollout = config.pathwise, config.rollout
  return Path(
    *(of.method, rollout.num_steps, rollout.guidance, of.eta, of.last, of.mean, of.std),
    *(of.repeats, of.first, of.end),
  )


def make_pathwise_step(
  denoise: Denoise,
  pipeline: Pipeline,
  judge: Judge,
  loss: Loss,
  tx: optax.GradientTransformation,
  path: Path,
  *,
  mesh: Mesh,
  state_sharding: Any,
  learning_rate: optax.Schedule,
  ema_decay: float,
  accumulate: int = 1,
  adapt: Callable[[Any, Any], Any] = lambda trained, base: trained,
) -> Callable:
  """Makes the jitted program of one update.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    pipeline: schedule, usual timesteps and shape of the latents.
    judge: the reward.
    loss: from `losses.make_loss`.
    tx: optimizer.
    path: how to sample.
    mesh: from `sharding.make_mesh`.
    state_sharding: of a `TrainState`.
    learning_rate: the schedule in `tx`, for the metric 'optim/lr'.
    ema_decay: limit of the moving average's decay.
    accumulate: number of micro-batches of an update.
    adapt: (trained parameters, base) -> the policy's parameters for `denoise`.

  Returns:
    `step(state, base, uncond, batch, rollout, start=None, guide=None) -> (state, metrics)`,
    with the arguments of `train_step.make_train_step`; of them, `state`, `base` and `batch` are
    read.
    `batch` has 'rows' ('cond', 'tokens' of the judge, and 'seed' uint32, all [B, ...]),
    'judge', the judge's parameters, and 'guide', conditioning [1, ...] that guidance leads away
    from, or None.
  """
  loss_of = functools.partial(_micro_loss, denoise, pipeline, judge, loss, path, adapt)

  def gradients_of(trained, fixed, rows, mean):
    return jax.grad(functools.partial(loss_of, mean=mean), has_aux=True)(trained, fixed, rows)

  gradients = mean_gradients.average(gradients_of, accumulate, mesh)

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(state_sharding, sharding.replicated(mesh))
  )
  def step(state, base, uncond, batch, rollout, start=None, guide=None):
    del uncond, rollout, start, guide
    chosen = sample_step(path, rng.key_of(state.seed, "pathwise", state.update))
    fixed = _Fixed(base, batch["judge"], batch["guide"], chosen)
    grads, metrics = gradients(state.params, fixed, batch["rows"])
    return train_step_lib.finish(
      *(state, grads, metrics, tx), learning_rate=learning_rate, ema_decay=ema_decay
    )

  return step


def sample_step(path: Path, key: jax.Array) -> jax.Array | None:
  """Samples what is random of an update's path, the same for all of its rows.

  Returns:
    Of 'predicted', the step whose prediction is used; of 'last' with a random number of steps
    with a gradient, that number; else None.
  """
  if path.method == "predicted":
    return jax.random.randint(key, (), path.first, path.end)
  if path.method == "last" and path.mean:
    drawn = jnp.round(path.mean + path.std * jax.random.normal(key))
    return jnp.clip(drawn, 1, path.last).astype(jnp.int32)
  return None


def sample_latents(
  denoise: pathwise.Denoise,
  params: Any,
  pipeline: Pipeline,
  path: Path,
  seeds: jax.Array,
  chosen: jax.Array | None,
) -> jax.Array:
  """Samples latents with a gradient.

  Args:
    denoise: (params, x_t, t) -> prediction, with guidance.
    params: the policy's.
    pipeline: schedule, usual timesteps and shape of the latents.
    path: how to sample.
    seeds: uint32 [B]; without noise of the steps, a seed gives the image of `generate`'s.
    chosen: from `sample_step`.

  Returns:
    float32 [n, B, C, h, w]; n is 1 but for 'renoised'.
  """
  shape, schedule = pipeline.latent_shape, pipeline.schedule
  assert isinstance(schedule, NoiseSchedule)  # `pathwise_settings` refuses others
  keys = jax.vmap(lambda s: rng.key_of(0, "generate", s))(seeds)
  noise = sampler.initial_noise(keys, shape)
  grid = timesteps.uniform_grid(
    *(schedule, path.num_steps, len(seeds)),
    **pipeline.spacing("ddim"),
    tokens=timesteps.image_tokens(shape),
  )
  if path.method == "renoised":
    new = jnp.stack([sampler.step_noise(keys, k, shape) for k in range(path.repeats)])
    return pathwise.sample_renoised(denoise, params, noise, grid, schedule, new)
  if path.method == "predicted":
    assert chosen is not None  # it always is
    return pathwise.predict_at(denoise, params, noise, grid, schedule, chosen)[None]
  stochastic: dict[str, Any] = {"eta": path.eta, "key": keys} if path.eta else {}
  return pathwise.sample_last(
    *(denoise, params, noise, grid, schedule), last=path.last, learns=chosen, **stochastic
  )[None]


def _micro_loss(
  denoise: Denoise,
  pipeline: Pipeline,
  judge: Judge,
  loss: Loss,
  path: Path,
  adapt: Callable[[Any, Any], Any],
  trained: Any,
  fixed: _Fixed,
  rows: Any,
  mean: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the mean loss of a micro-batch and the means of its metrics."""

  def guided(params, x_t, t):
    one = guidance_lib.classifier_free(
      lambda *of: denoise(params, *of), rows["cond"], fixed.guide, path.guidance
    )
    return one(x_t, t)

  latents = sample_latents(
    *(guided, adapt(trained, fixed.base), pipeline, path, rows["seed"], fixed.chosen)
  )
  repeats = latents.shape[0]
  many = lambda x: jnp.concatenate([x] * repeats)  # noqa: E731
  scores = judge.score(
    fixed.judge, latents.reshape(-1, *latents.shape[2:]), jax.tree.map(many, rows["tokens"])
  )
  reward = judge.total(scores)
  per_sample, metrics = loss.objective(Terms({}, {}, {"reward": reward}, mean))
  metrics = {
    "loss": per_sample,
    "reward/mean": reward,
    **{f"reward/{name}": of for name, of in scores.items()},
    **metrics,
  }
  return per_sample.mean(), jax.tree.map(jnp.mean, metrics)
