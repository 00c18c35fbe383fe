"""Pictures of a model: the same prompt and seed give the same picture in any batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref import rng, sharding
from jaxpref.data import encode
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import DivergedError, UserError
from jaxpref.models import unet as unet_lib
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline


class NonFiniteError(DivergedError):
  """Images of which some have pixels that are not finite.

  Attributes:
    images: uint8 [N, H, W, 3], all of them.
    finite: bool [N].
  """

  def __init__(self, images: np.ndarray, finite: np.ndarray, named: Sequence[str]):
    first = int(np.argmin(finite))
    super().__init__(
      f"{np.sum(~finite)} of {len(finite)} images have pixels that are not finite, the first "
      f"is of {named[first]!r}: the network overflows; lower the guidance scale or compute in "
      "float32"
    )
    self.images, self.finite = images, finite


DECODES = ("whole", "sliced", "tiled")


def make_generator(
  pipeline: Pipeline,
  mesh: Mesh,
  *,
  num_steps: int,
  guidance: float,
  batch_size: int,
  solver: str = "dpm_solver",
  order: int = 2,
  size: tuple[int, int] | None = None,
  negative: str = "",
  decode: str = "whole",
  image_guidance: float | None = None,
) -> Callable[..., np.ndarray]:
  """A program that turns prompts and seeds into pictures, or improves pictures.

  Args:
    pipeline: everything but the UNet's parameters.
    mesh: the batch is spread over all its devices.
    num_steps: solver steps.
    guidance: classifier-free guidance scale, at most 1: none; of an improver, to the text.
    batch_size: images at once; rounded up to fill the devices.
    solver: 'dpm_solver' (++, multistep), 'ddim' or 'ddpm', on the timesteps that the
      pipeline's scheduler configuration asks for, or else the solver's usual ones.
    order: of the DPM-Solver.
    size: height and width in pixels; by default those the UNet was trained for.
    negative: a prompt to be guided away from.
    decode: the VAE's images 'whole' batches at once, 'sliced' one by one, or one by one
      and 'tiled'.
    image_guidance: of an improver, how closely to keep to the pictures it is shown, see
      `guidance.by_text_and_image`; None if it is shown none, as other pipelines.

  Returns:
    `generate(unet_params, cond, seeds, on_batch=None, *, names=None) -> uint8 [N, H, W, 3]`
    with the prompts' conditioning, [N, ...], and in it, where pictures are improved, their
    latents as 'image'; `on_batch(n)` is told how many pictures are done. It raises a
    `NonFiniteError` that quotes the image's name, by default its seed, where pixels are not
    finite.

  Raises:
    UserError: the number of steps, the size or the way to decode cannot be.
  """
  if decode not in DECODES:
    raise UserError(f"decode must be one of {', '.join(DECODES)}, got {decode!r}")
  denoise = unet_lib.make_denoise(pipeline.modules["unet"], mesh=mesh)
  vae = pipeline.modules["vae"]
  schedule = pipeline.schedule
  latent_shape = latent_shape_of(pipeline, size)
  rows = sharding.round_up(batch_size, mesh)
  spacing = pipeline.spacing(solver)
  timesteps_lib.uniform_grid(schedule, num_steps, 1, **spacing)  # refuses before anything runs

  @jax.jit
  def program(params, vae_params, cond, uncond, seeds):
    grid = timesteps_lib.uniform_grid(schedule, num_steps, rows, **spacing)
    keys = jax.vmap(lambda s: rng.key_of(0, "generate", s))(seeds)
    told = lambda x_t, t, c: denoise(params, x_t, t, c)  # noqa: E731
    if image_guidance is not None:
      texts = {name: leaf for name, leaf in cond.items() if name != "image"}
      guided = guidance_lib.by_text_and_image(
        *(told, texts, uncond, cond["image"]),
        text_scale=guidance,
        image_scale=image_guidance,
      )
    else:
      if pipeline.is_improver:
        blank = {"image": jnp.zeros((rows, *latent_shape))}
        cond, uncond = {**cond, **blank}, {**uncond, **blank}
      guided = guidance_lib.classifier_free(told, cond, uncond, guidance)
    noise = sampler_lib.initial_noise(keys, latent_shape)
    latents = sampler_lib.sample(
      guided, noise, grid, schedule, solver=solver, order=order, key=keys
    )
    if decode == "tiled":
      return latents
    if decode == "sliced":
      return vae_lib.decode_sliced(vae, vae_params, latents, at_once=mesh.size)
    return vae_lib.decode(vae, vae_params, latents)

  vae_params = sharding.place_params(pipeline.params["vae"], mesh)
  uncond = (
    encode.encode_prompts(pipeline, mesh, [negative], size=size, clip_skip=0)
    if negative
    else encode.encode_no_prompt(pipeline, mesh, size=size)
  )
  uncond = sharding.replicate(uncond, mesh)

  def generate(
    params: Any,
    cond: Any,
    seeds: Sequence[int],
    on_batch: Callable[[int], Any] | None = None,
    *,
    names: Sequence[str] | None = None,
  ) -> np.ndarray:
    numbers = np.asarray(seeds, np.uint32)
    done, finite = [], []
    for start in range(0, len(numbers), rows):
      index = np.arange(start, start + rows).clip(max=len(numbers) - 1)
      placed_cond, placed_seeds = sharding.place_batch((cond, numbers), mesh, index)
      decoded = program(params, vae_params, placed_cond, uncond, placed_seeds)
      real = min(rows, len(numbers) - start)
      if decode == "tiled":
        one = lambda z: vae_lib.decode_tiled(vae, vae_params, z)  # noqa: E731
        tiled = [one(decoded[i : i + 1]) for i in range(real)]
        decoded = jax.tree.map(lambda *parts: np.concatenate(parts), *tiled)
      done.append(sharding.to_host(decoded.pixels)[:real])
      finite.append(sharding.to_host(decoded.finite)[:real])
      if on_batch:
        on_batch(start + real)
    images, whole = np.concatenate(done), np.concatenate(finite)
    if not whole.all():
      raise NonFiniteError(images, whole, names or [f"seed {n}" for n in numbers])
    return images

  return generate


def latent_shape_of(pipeline: Pipeline, size: tuple[int, int] | None) -> tuple[int, int, int]:
  """Channels, height and width of a latent for pictures of `size` (height, width) pixels.

  Raises:
    UserError: the pipeline makes no pictures of that size.
  """
  if size is None:
    return pipeline.latent_shape
  unit = pipeline.vae_factor * 2 ** (len(pipeline.modules["unet"].block_out_channels) - 1)
  if any(n < unit or n % unit for n in size):
    raise UserError(f"width and height must be multiples of {unit}, got {size[1]} x {size[0]}")
  height, width = (n // pipeline.vae_factor for n in size)
  return pipeline.latent_shape[0], height, width


def seeds_of(num_prompts: int, images_per_prompt: int, *, seed: int) -> np.ndarray:
  """A seed for each picture, prompts slow, images fast; no two alike."""
  return (seed + np.arange(num_prompts * images_per_prompt)).astype(np.uint32)
