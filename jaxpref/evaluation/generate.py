"""Pictures of a model: the same prompt and seed give the same picture in any batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import randomness, sharding
from jaxpref.data.encode import encode_prompts
from jaxpref.diffusion import grid as grid_lib
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sample as sample_lib
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline


def make_generator(
  pipeline: Pipeline, mesh: Mesh, *, num_steps: int, guidance: float, batch_size: int
) -> Callable[..., np.ndarray]:
  """A program that turns prompts and seeds into pictures with DPM-Solver++ (2M).

  Args:
    pipeline: everything but the UNet's parameters.
    mesh: the batch is spread over all its devices.
    num_steps: solver steps.
    guidance: classifier-free guidance scale.
    batch_size: images at once; rounded up to fill the devices.

  Returns:
    `generate(unet_params, cond, seeds, on_batch=None) -> uint8 [N, H, W, 3]` with the
    prompts' embeddings [N, L, D]; `on_batch(n)` is told how many pictures are done.
  """
  denoise = unet_lib.make_denoise(pipeline.modules["unet"])
  vae = pipeline.modules["vae"]
  schedule = pipeline.schedule
  size = sharding.round_up(batch_size, mesh)

  @jax.jit
  def program(params, vae_params, cond, empty_cond, seeds):
    grid = grid_lib.uniform_grid(schedule, num_steps, size, steps_offset=1)
    keys = jax.vmap(lambda s: randomness.key_of(0, "generate", s))(seeds)
    guided = guidance_lib.classifier_free(
      lambda x_t, t, c: denoise(params, x_t, t, c), cond, empty_cond, guidance
    )
    noise = sample_lib.initial_noise(keys, pipeline.latent_shape)
    latents = sample_lib.sample(guided, noise, grid, schedule)
    return vae_lib.decode(vae, vae_params, latents)

  vae_params = jax.device_put(pipeline.params["vae"], sharding.replicated(mesh))
  empty_cond = jax.device_put(encode_prompts(pipeline, mesh, [""]), sharding.replicated(mesh))

  def generate(
    params: Any,
    cond: np.ndarray,
    seeds: Sequence[int],
    on_batch: Callable[[int], Any] | None = None,
  ) -> np.ndarray:
    numbers = np.asarray(seeds, np.uint32)
    done = []
    for start in range(0, len(cond), size):
      rows = np.arange(start, start + size).clip(max=len(cond) - 1)
      placed = sharding.place_batch((cond[rows], numbers[rows]), mesh)
      images = program(params, vae_params, placed[0], empty_cond, placed[1])
      real = min(size, len(cond) - start)
      done.append(np.asarray(images)[:real])
      if on_batch:
        on_batch(start + real)
    return np.concatenate(done)

  return generate


def seeds_of(num_prompts: int, images_per_prompt: int, *, seed: int) -> np.ndarray:
  """A seed for each picture, prompts slow, images fast; no two alike."""
  return (seed + np.arange(num_prompts * images_per_prompt)).astype(np.uint32)
