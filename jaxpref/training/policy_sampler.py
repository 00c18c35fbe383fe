"""Samples of the policy, as latents and as images, while it is trained."""

from collections.abc import Callable

import jax

from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.evaluation import sampling
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline


def make_policy_sampler(
  denoise: Denoise,
  pipeline: Pipeline,
  *,
  solver: str,
  order: int,
  num_steps: int,
  guidance: float,
) -> Callable[..., tuple[jax.Array, vae_lib.Decoded]]:
  """Makes the jitted program that samples images from the policy.

  A seed gives the image that `jaxpref.generate` makes of it with the same settings.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    pipeline: the schedule, the VAE's module, and the solver's usual timesteps.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: order of the DPM-Solver.
    num_steps: number of solver steps.
    guidance: classifier-free guidance scale; at most 1: no guidance.

  Returns:
    `sample(params, vae_params, cond, uncond, seeds) -> (latents [B, C, h, w], Decoded)`. `cond`
    is a tree of [B, ...], `uncond` of [1, ...], and `seeds` uint32 [B].
  """

  @jax.jit
  def sample(params, vae_params, cond, uncond, seeds):
    guided = guidance_lib.classifier_free(
      lambda x_t, t, c: denoise(params, x_t, t, c), cond, uncond, guidance
    )
    latents = sampling.sample_seeds(
      *(guided, seeds, pipeline, pipeline.latent_shape),
      num_steps=num_steps,
      solver=solver,
      order=order,
    )
    return latents, vae_lib.decode(pipeline.modules["vae"], vae_params, latents)

  return sample
