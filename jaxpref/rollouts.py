"""Online negatives: states that the policy itself visits on its way from noise to image.

The sampler is a program of its own, apart from the train step, and its parameters are an
argument: the policy as it is (refreshed at every update) or a copy that lags behind.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from jaxpref import randomness
from jaxpref.diffusion import grid as grid_lib
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sample as sample_lib
from jaxpref.diffusion.schedule import NoiseSchedule
from jaxpref.models.unet import Denoise


@flax.struct.dataclass
class Rollout:
  """One state of each sampled trajectory.

  Attributes:
    x_t: what the denoiser was shown, [B, C, h, w].
    target: what it answered, the training target of the policy's half, [B, C, h, w].
    t: timesteps, int32 [B]; the experts' half of the batch takes the same.
  """

  x_t: jax.Array
  target: jax.Array
  t: jax.Array


def make_rollout(
  denoise: Denoise,
  schedule: NoiseSchedule,
  *,
  seed: int,
  latent_shape: tuple[int, int, int],
  num_steps: int,
  solver: str,
  order: int,
  guidance: float,
  prompt_dropout: float,
) -> Callable[..., Rollout]:
  """Diffusion-DRO's rollout as one jitted program.

  Each sample's timesteps are shifted by a random offset, so that every timestep is
  trained, and one of its `num_steps` states is kept, all being equally likely.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: noise schedule.
    seed: of the run.
    latent_shape: channels, height and width.
    num_steps: solver steps from noise to image.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: of the DPM-Solver.
    guidance: classifier-free guidance scale; 1 for none, as published.
    prompt_dropout: as in the train step, which drops the same rows' prompts.

  Returns:
    `rollout(params, update, cond, uncond)` of trees of [B, ...] and [1, ...].
  """

  @jax.jit
  def rollout(params: Any, update, cond, uncond) -> Rollout:
    rows = jax.tree.leaves(cond)[0].shape[0]
    key = randomness.key_of(seed, "rollout", update)
    cond = randomness.drop_prompts(seed, update, cond, uncond, rate=prompt_dropout)
    spacing = schedule.num_timesteps // num_steps
    offsets = jax.random.randint(jax.random.fold_in(key, 0), (rows,), 0, spacing)
    picks = jax.random.randint(jax.random.fold_in(key, 1), (rows,), 0, num_steps)
    noise_keys = jax.random.split(jax.random.fold_in(key, 2), rows)
    x_T = sample_lib.initial_noise(noise_keys, latent_shape)  # noqa: N806
    guided = guidance_lib.classifier_free(
      lambda x_t, t, c: denoise(params, x_t, t, c), cond, uncond, guidance
    )
    _, seen = sample_lib.sample(
      guided,
      x_T,
      grid_lib.offset_grid(schedule, num_steps, offsets),
      schedule,
      solver=solver,
      order=order,
      key=noise_keys,
      trajectory=True,
    )
    at_pick = jax.vmap(lambda steps, k: steps[k], in_axes=(1, 0))
    return Rollout(
      x_t=at_pick(seen.states, picks),
      target=at_pick(seen.predictions, picks),
      t=at_pick(seen.timesteps, picks),
    )

  return rollout
