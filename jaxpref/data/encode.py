"""Encoding of images to latents and of captions to conditioning, once before training."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.data.rows import Row
from jaxpref.errors import UserError
from jaxpref.models import text
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline
from jaxpref.models.unet import Cond
from jaxpref.runtime import watchdog

_PIXELS_AT_ONCE = 1 << 21  # per device; the VAE's first level takes 512 bytes per pixel


def encode_images(
  pipeline: Pipeline, mesh: Mesh, images: Sequence[np.ndarray], *, batch_size: int = 50
) -> np.ndarray:
  """Encodes images to the modes of their VAE posteriors.

  Args:
    pipeline: the VAE and its parameters.
    mesh: devices that share a batch.
    images: N images, uint8 [H, W, 3].
    batch_size: images per call; large images take smaller batches.

  Returns:
    Scaled latents, [N, C, h, w].
  """
  return _encode_all(_encode, pipeline, mesh, images, batch_size)


def encode_posteriors(
  pipeline: Pipeline, mesh: Mesh, images: Sequence[np.ndarray], *, batch_size: int = 50
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes images to the modes and standard deviations of their VAE posteriors."""
  return _encode_all(_encode_posterior, pipeline, mesh, images, batch_size)


def _encode_all(
  program: Any, pipeline: Pipeline, mesh: Mesh, images: Sequence[np.ndarray], batch_size: int
) -> Any:
  run = functools.partial(program, pipeline.modules["vae"])
  fits = mesh.size * _PIXELS_AT_ONCE // (images[0].shape[0] * images[0].shape[1])
  size = min(batch_size, max(fits, 1))
  return in_batches(run, pipeline.params["vae"], np.stack(images), size, mesh)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all calls
def _encode(vae, params, images):
  return vae_lib.encode(vae, params, images)


@functools.partial(jax.jit, static_argnums=0)
def _encode_posterior(vae, params, images):
  return vae_lib.encode_posterior(vae, params, images)


def encode_rows(
  pipeline: Pipeline, mesh: Mesh, rows: Sequence[Row], *, flip: bool, latents: str = "mode"
) -> dict[str, Any]:
  """Encodes rows to the host arrays that a train step takes.

  Args:
    pipeline: the VAE and the text encoders.
    mesh: devices that share a batch.
    rows: N rows of one kind.
    flip: also add a mirrored copy of every row.
    latents: 'mode' of the VAE's posterior, or 'sample' to keep its standard deviation as well,
      from which each update samples.

  Returns:
    'latents' [N, A, C, h, w], the modes; 'std' of the same shape for 'sample'; 'cond', a tree
    of [N, ...]; and 'labels', a dict of [N].

  Raises:
    UserError: the encoding of a row is not finite, so that no update could learn from it.
  """
  if flip:
    rows = [*rows, *(r._replace(images=tuple(i[:, ::-1] for i in r.images)) for r in rows)]
  images = [i for r in rows for i in r.images]
  if latents == "sample":
    found = dict(
      zip(("latents", "std"), encode_posteriors(pipeline, mesh, images), strict=True)
    )
  else:
    found = {"latents": encode_images(pipeline, mesh, images)}
  found = {name: x.reshape((len(rows), -1, *x.shape[1:])) for name, x in found.items()}
  captions = [r.prefix + r.caption for r in rows]
  text.warn_of_cut(pipeline.tokenizers, captions, "captions of the data")
  cond = encode_prompts(pipeline, mesh, captions)
  _check_finite(rows, {**found, **cond})
  return {
    **found,
    "cond": cond,
    "labels": {"desirable": np.array([r.desirable for r in rows])},
  }


def _check_finite(rows: Sequence[Row], arrays: Cond) -> None:
  for name, array in arrays.items():
    for i, of_row in enumerate(array):
      if not np.isfinite(of_row).all():
        what, part = (
          ("images", "VAE") if name in ("latents", "std") else ("caption", "text encoder")
        )
        raise UserError(
          f"row {i} of the data ({rows[i].caption!r}): the {part}'s encoding of its {what} is "
          f"not finite; check the weights of the {part}"
        )


def encode_prompts(
  pipeline: Pipeline,
  mesh: Mesh,
  prompts: Sequence[str],
  *,
  size: tuple[int, int] | None = None,
  batch_size: int = 100,
  clip_skip: int | None = None,
) -> Cond:
  """Encodes prompts to the UNet's conditioning, numpy [N, ...].

  Args:
    pipeline: the text encoders and tokenizers.
    mesh: devices that share a batch.
    prompts: N texts.
    size: height and width of the images in pixels. SDXL is conditioned on it as the original
      and the target size, without a crop. None means the size that it was trained for.
    batch_size: prompts per call.
    clip_skip: last text encoder layers to skip; None takes the pipeline's number, which
      diffusers uses for prompts. diffusers uses 0 for negative prompts.
  """
  parts = [part for part in pipeline.modules if part.startswith("text_encoder")]
  encoders = [pipeline.modules[part] for part in parts]
  params = [pipeline.params[part] for part in parts]
  ids = text.tokenize(pipeline.tokenizers, prompts)
  height, width = size or (pipeline.image_size, pipeline.image_size)

  skip = pipeline.clip_skip if clip_skip is None else clip_skip

  @jax.jit
  def run(params, ids):
    if not pipeline.is_xl:
      return {"text": text.encode_text(encoders[0], params[0], ids[0], clip_skip=skip)}
    hidden, pooled = text.encode_text_xl(encoders, params, ids, clip_skip=skip)
    sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    time_ids = jnp.broadcast_to(sizes, (hidden.shape[0], 6))
    return {"text": hidden, "pooled": pooled, "time_ids": time_ids}

  return in_batches(run, params, ids, batch_size, mesh)


def encode_no_prompt(
  pipeline: Pipeline, mesh: Mesh, *, size: tuple[int, int] | None = None
) -> Cond:
  """Encodes the unconditional input that the UNet's family was trained with, [1, ...]."""
  cond = dict(encode_prompts(pipeline, mesh, [""], size=size, clip_skip=0))
  if pipeline.zeroes_uncond:
    cond |= {name: np.zeros_like(cond[name]) for name in ("text", "pooled")}
  return cond


def encode_dropped_prompt(pipeline: Pipeline, mesh: Mesh, kind: str) -> Cond:
  """Encodes the conditioning of rows whose prompt is dropped, [1, ...].

  Args:
    pipeline: the text encoders and tokenizers.
    mesh: devices for the text encoders.
    kind: 'empty' for the prompt "", 'unconditional' for `encode_no_prompt`. They differ only
      for SDXL, where the unconditional input is zeros.
  """
  if kind == "unconditional":
    return encode_no_prompt(pipeline, mesh)
  return encode_prompts(pipeline, mesh, [""])


def in_batches(run: Any, params: Any, rows: Any, size: int, mesh: Mesh) -> Any:
  """Calls `run(params, rows)` in batches of one size, so that it compiles once.

  Args:
    run: a jitted function; its rows are sharded over the mesh.
    params: a tree, placed by `sharding.place_params`.
    rows: a tree of numpy arrays [N, ...].
    size: largest number of rows per batch; rounded up to a multiple of the device count.
    mesh: from `sharding.make_mesh`.

  Returns:
    The results of `run`, a tree of numpy arrays [N, ...].

  Raises:
    StoppedError: the run was asked to stop.
  """
  total = len(jax.tree.leaves(rows)[0])
  size = sharding.round_up(min(size, total), mesh)
  params = sharding.place_params(params, mesh)
  done = []
  for start in range(0, total, size):
    watchdog.beat_or_stop()
    index = np.arange(start, start + size).clip(max=total - 1)
    out = sharding.to_host(run(params, sharding.place_batch(rows, mesh, index)))
    done.append(jax.tree.map(lambda x, s=start: x[: total - s], out))
  watchdog.rest()  # the caller compiles next, which takes an unknown time
  return jax.tree.map(lambda *parts: np.concatenate(parts), *done)
