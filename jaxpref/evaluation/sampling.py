"""Generation of images: a prompt and a seed give the same image in any batch."""

import functools
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
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline

DECODES = ("whole", "sliced", "tiled")


class NonFiniteError(DivergedError):
  """Generated images with non-finite pixels.

  Attributes:
    images: all images, uint8 [N, H, W, 3].
    finite: whether all pixels of an image are finite, bool [N].
  """

  def __init__(self, images: np.ndarray, finite: np.ndarray, names: Sequence[str]):
    first = int(np.argmin(finite))
    super().__init__(
      f"{np.sum(~finite)} of {len(finite)} images have non-finite pixels, first the image of "
      f"{names[first]!r}: the network overflows; lower the guidance scale or compute in float32"
    )
    self.images, self.finite = images, finite


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
  """Builds a function that generates images, or improves images, for prompts and seeds.

  Args:
    pipeline: all models and parameters except the denoiser's parameters.
    mesh: devices that share a batch.
    num_steps: solver steps.
    guidance: classifier-free guidance scale towards the prompt; at most 1 means no guidance. A
      denoiser that was distilled from guidance gets the scale as an input instead.
    batch_size: images per program call, rounded up to a multiple of the device count.
    solver: 'dpm_solver' (++, multistep), 'ddim' or 'ddpm', on the timesteps of the pipeline's
      scheduler configuration or, if it sets none, the solver's usual timesteps.
    order: order of the DPM-Solver.
    size: height and width in pixels; None means the size that the model was trained for.
    negative: a prompt that guidance moves away from.
    decode: 'whole' decodes a batch in one VAE call, 'sliced' one image per call, 'tiled' one
      image in overlapping tiles.
    image_guidance: an improver's guidance scale towards the input image, see
      `guidance.by_text_and_image`; None means no input images.

  Returns:
    `generate(params, cond, seeds, on_batch=None, *, names=None) -> uint8 [N, H, W, 3]`.
    `params` are the denoiser's. `cond` is the prompts' conditioning, [N, ...]; for an improver
    its 'image' has the latents of the input images. After each batch it calls `on_batch(n)`
    with the number of finished images. If pixels are non-finite, it raises a `NonFiniteError`
    with the image's name, by default its seed.

  Raises:
    UserError: the number of steps, the size or `decode` is invalid, or the model does not take
      a negative prompt.
  """
  if decode not in DECODES:
    raise UserError(f"decode must be one of {', '.join(DECODES)} (got {decode!r})")
  if negative and pipeline.takes_guidance:
    raise UserError(
      f"{pipeline.family.name} was distilled from guidance and does not take a negative prompt"
    )
  denoise = pipeline.make_denoise(mesh=mesh, guidance=guidance)
  scale = pipeline.classifier_free_scale(guidance)
  vae, schedule = pipeline.modules["vae"], pipeline.schedule
  latent_shape = latent_shape_of(pipeline, size)
  rows = sharding.round_up(batch_size, mesh)
  sampler_lib.check_solver(schedule, solver)
  grid_of(pipeline, latent_shape, num_steps, solver, 1)  # raises before anything runs

  @jax.jit
  def program(params, vae_params, cond, uncond, seeds):
    if pipeline.is_improver and image_guidance is None:
      blank = {"image": jnp.zeros((rows, *latent_shape))}
      cond, uncond = {**cond, **blank}, {**uncond, **blank}
    guided = _guide(functools.partial(denoise, params), cond, uncond, scale, image_guidance)
    latents = sample_seeds(
      *(guided, seeds, pipeline, latent_shape), num_steps=num_steps, solver=solver, order=order
    )
    if decode == "tiled":
      return latents
    if decode == "sliced":
      return vae_lib.decode_sliced(vae, vae_params, latents, at_once=mesh.size)
    return vae_lib.decode(vae, vae_params, latents)

  vae_params = sharding.place_params(pipeline.params["vae"], mesh)
  uncond = sharding.replicate(_encode_negative(pipeline, mesh, negative, size), mesh)

  def generate(params, cond, seeds, on_batch=None, *, names=None):
    numbers = np.asarray(seeds, np.uint32)
    done, finite = [], []
    for start in range(0, len(numbers), rows):
      index = np.arange(start, start + rows).clip(max=len(numbers) - 1)
      placed_cond, placed_seeds = sharding.place_batch((cond, numbers), mesh, index)
      decoded = program(params, vae_params, placed_cond, uncond, placed_seeds)
      real = min(rows, len(numbers) - start)  # the last batch is padded
      if decode == "tiled":
        decoded = _decode_tiled(vae, vae_params, decoded, real)
      done.append(sharding.to_host(decoded.pixels)[:real])
      finite.append(sharding.to_host(decoded.finite)[:real])
      if on_batch:
        on_batch(start + real)
    images, whole = np.concatenate(done), np.concatenate(finite)
    if not whole.all():
      raise NonFiniteError(images, whole, names or [f"seed {n}" for n in numbers])
    return images

  return generate


def sample_seeds(
  denoise: Callable[[jax.Array, jax.Array], jax.Array],
  seeds: jax.Array,
  pipeline: Pipeline,
  latent_shape: tuple[int, int, int],
  *,
  num_steps: int,
  solver: str,
  order: int,
  starts: jax.Array | None = None,
  **options: Any,
) -> Any:
  """Samples the latents of seeds, float32 [B, C, h, w]; to be called inside `jax.jit`.

  Args:
    denoise: (x_t, t) -> prediction, with guidance.
    seeds: uint32 [B].
    pipeline: the schedule, and the solver's usual timesteps.
    latent_shape: of one image.
    num_steps: solver steps.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: order of the DPM-Solver.
    starts: seeds of the noise to start from, uint32 [B]; by default `seeds`.
    **options: `eta` and `trajectory` of `sampler.sample`, which may return more.
  """
  keys, first = (
    jax.vmap(lambda s: rng.key_of(0, "generate", s))(of)
    for of in (seeds, seeds if starts is None else starts)
  )
  return sampler_lib.sample(
    denoise,
    sampler_lib.initial_noise(first, latent_shape),
    grid_of(pipeline, latent_shape, num_steps, solver, len(seeds)),
    pipeline.schedule,
    solver=solver,
    order=order,
    key=keys,
    **options,
  )


def grid_of(
  pipeline: Pipeline, latent_shape: tuple[int, int, int], num_steps: int, solver: str, rows: int
) -> timesteps_lib.Grid:
  """Returns the levels that a solver visits by default, for `rows` samples."""
  return timesteps_lib.uniform_grid(
    *(pipeline.schedule, num_steps, rows),
    **pipeline.spacing(solver),
    tokens=timesteps_lib.image_tokens(latent_shape),
  )


def _guide(
  denoise: Callable, cond: Any, uncond: Any, guidance: float, image_guidance: float | None
) -> Callable:
  """Adds guidance to a denoiser: towards the prompt or, of an improver, prompt and image."""
  if image_guidance is None:
    return guidance_lib.classifier_free(denoise, cond, uncond, guidance)
  texts = {name: leaf for name, leaf in cond.items() if name != "image"}
  return guidance_lib.by_text_and_image(
    *(denoise, texts, uncond, cond["image"]),
    text_scale=guidance,
    image_scale=image_guidance,
  )


def _encode_negative(
  pipeline: Pipeline, mesh: Mesh, negative: str, size: tuple[int, int] | None
) -> Any:
  """Returns the conditioning that guidance moves away from."""
  if negative:
    return encode.encode_prompts(pipeline, mesh, [negative], size=size, negative=True)
  return encode.encode_no_prompt(pipeline, mesh, size=size)


def _decode_tiled(vae: Any, vae_params: Any, latents: jax.Array, count: int) -> Any:
  """Decodes the first `count` latents one by one, in tiles."""
  parts = [vae_lib.decode_tiled(vae, vae_params, latents[i : i + 1]) for i in range(count)]
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def latent_shape_of(pipeline: Pipeline, size: tuple[int, int] | None) -> tuple[int, int, int]:
  """Returns channels, height and width of the latents of images of `size`.

  Args:
    pipeline: the VAE's factor and the denoiser's depth limit the sizes.
    size: height and width in pixels; None means the size that the model was trained for.

  Raises:
    UserError: the pipeline cannot generate images of that size.
  """
  if size is None:
    return pipeline.latent_shape
  unit = pipeline.size_unit
  if any(n < unit or n % unit for n in size):
    raise UserError(
      f"width and height must be multiples of {unit} (got {size[1]} x {size[0]} pixels)"
    )
  height, width = (n // pipeline.vae_factor for n in size)
  return pipeline.latent_shape[0], height, width


def seeds_of(num_prompts: int, images_per_prompt: int, *, seed: int) -> np.ndarray:
  """Returns a distinct seed for each image; images of a prompt follow each other."""
  return (seed + np.arange(num_prompts * images_per_prompt)).astype(np.uint32)
