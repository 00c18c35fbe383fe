"""Samples of the policy, as latents and as images, while it is trained."""

from collections.abc import Callable

import jax

from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.evaluation import sampling
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline
from jaxpref.training import step_rows


def make_policy_sampler(
  denoise: Denoise,
  pipeline: Pipeline,
  *,
  solver: str,
  order: int,
  num_steps: int,
  guidance: float,
) -> Callable[..., tuple[jax.Array, vae_lib.Decoded, step_rows.Steps | None]]:
  """Makes the jitted program that samples images from the policy.

  A seed gives the image that `jaxpref.generate` makes of it with the same settings.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    pipeline: the schedule, the VAE's module, and the solver's usual timesteps.
    solver: any of `sampler.sample`'s that the model has.
    order: order of the DPM-Solver.
    num_steps: number of solver steps.
    guidance: classifier-free guidance scale; at most 1: no guidance.

  Returns:
    `sample(params, vae_params, cond, uncond, seeds, chosen=None) -> (latents [B, C, h, w],
    Decoded, Steps or None)`. `cond` is a tree of [B, ...], `uncond` of [1, ...], and `seeds`
    uint32 [B]. `chosen` are the strength of each step's noise, [N], the steps to return,
    int [B, S], and the seeds of the noise to start from, uint32 [B].
  """
  shape, schedule = pipeline.latent_shape, pipeline.schedule

  @jax.jit
  def sample(params, vae_params, cond, uncond, seeds, chosen=None):
    guided = guidance_lib.classifier_free(
      lambda x_t, t, c: denoise(params, x_t, t, c), cond, uncond, guidance
    )
    settings = {"num_steps": num_steps, "solver": solver, "order": order}
    steps = None
    if chosen is None:
      latents = sampling.sample_seeds(guided, seeds, pipeline, shape, **settings)
    else:
      eta, picks, starts = chosen
      latents, seen = sampling.sample_seeds(
        *(guided, seeds, pipeline, shape), **settings, starts=starts, eta=eta, trajectory=True
      )
      grid = sampling.grid_of(pipeline, shape, num_steps, solver, len(seeds))
      table = sampler_lib.coefficients(grid, solver=solver, eta=eta)
      steps = step_rows.take(seen.states, latents, grid, table, schedule, picks)
    return latents, vae_lib.decode(pipeline.modules["vae"], vae_params, latents), steps

  return sample
