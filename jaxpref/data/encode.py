"""Encoding of images to latents and of captions to conditioning, once before training."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import sharding
from jaxpref.data.gather import Gather, Lazy, in_threads
from jaxpref.data.row_set import RowSet
from jaxpref.errors import UserError
from jaxpref.models import text
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Cond
from jaxpref.models.pipeline import Pipeline
from jaxpref.runtime import watchdog

Images = Sequence[np.ndarray] | Lazy
_TOKEN_PAIRS_AT_ONCE = 1_000_000  # 15 texts of 256 tokens: T5's logits then take 250 MB
_PIXELS_AT_ONCE = 1 << 21  # per device; the VAE's first level takes 512 bytes per pixel


def encode_images(
  pipeline: Pipeline, mesh: Mesh, images: Images, *, batch_size: int = 50
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
  pipeline: Pipeline, mesh: Mesh, images: Images, *, batch_size: int = 50
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes images to the modes and standard deviations of their VAE posteriors."""
  return _encode_all(_encode_posterior, pipeline, mesh, images, batch_size)


def each_posterior(
  pipeline: Pipeline, mesh: Mesh, images: Lazy, *, start: int = 0
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
  """Yields what `encode_posteriors` returns batch by batch, each after its first number."""
  run = functools.partial(_encode_posterior, pipeline.modules["vae"])
  size = images_at_once(mesh, *images.shape[1:3])
  yield from each_batch(run, pipeline.params["vae"], images, size, mesh, start=start)


def _encode_all(
  program: Any, pipeline: Pipeline, mesh: Mesh, images: Images, batch_size: int
) -> Any:
  run = functools.partial(program, pipeline.modules["vae"])
  rows: Any = images if isinstance(images, Lazy) else np.stack(images)
  size = images_at_once(mesh, *rows.shape[1:3], most=batch_size)
  return in_batches(run, pipeline.params["vae"], rows, size, mesh)


def images_at_once(mesh: Mesh, height: int, width: int, *, most: int = 50) -> int:
  """Returns the number of images that the VAE encodes in a call."""
  return min(most, max(mesh.size * _PIXELS_AT_ONCE // (height * width), 1))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all calls
def _encode(vae, params, images):
  return vae_lib.encode(vae, params, images)


@functools.partial(jax.jit, static_argnums=0)
def _encode_posterior(vae, params, images):
  return vae_lib.encode_posterior(vae, params, images)


def encode_rows(
  pipeline: Pipeline, mesh: Mesh, rows: RowSet, *, flip: bool, latents: str = "mode"
) -> dict[str, Any]:
  """Encodes all images and captions of rows, each once, into the host's memory.

  Args:
    pipeline: the VAE and the text encoders.
    mesh: devices that share a batch.
    rows: N rows.
    flip: also add a mirrored copy of every row, after all others.
    latents: 'mode' of the VAE's posterior, or 'sample' to keep its standard deviation as well,
      from which each update samples.

  Returns:
    What a train step takes, as arrays that are read by rows: 'latents' [N, A, C, h, w], the
    modes; 'std' of the same shape for 'sample'; 'cond', a tree of [N, ...]; and 'labels', a
    dict of [N].

  Raises:
    UserError: the encoding of a row is not finite, so that no update could learn from it.
  """
  used, image = np.unique(rows.image, return_inverse=True)
  image = image.reshape(rows.image.shape)
  pictures = read_images(rows.images, used, flip=flip)
  if latents == "sample":
    found = dict(
      zip(("latents", "std"), encode_posteriors(pipeline, mesh, pictures), strict=True)
    )
  else:
    found = {"latents": encode_images(pipeline, mesh, pictures)}
  texts, text_number = np.unique(rows.text_numbers(), return_inverse=True)
  captions = [rows.text(number) for number in texts]
  text.warn_of_cut(pipeline.tokenizers, captions, "captions of the data")
  cond = encode_prompts(pipeline, mesh, captions, size=pictures.shape[1:3])
  for name, array in found.items():
    _check_finite(rows, array, name, lambda i: (image == i % len(used)).any(axis=1))
  for name, array in cond.items():
    _check_finite(rows, array, name, lambda i: text_number == i)
  return by_row(
    *(found, cond),
    image=image,
    text_number=text_number,
    desirable=rows.desirable,
    flipped=len(used) * flip,
  )


def by_row(
  found: Mapping[str, Any],
  cond: Mapping[str, Any],
  *,
  image: np.ndarray,
  text_number: np.ndarray,
  desirable: np.ndarray,
  flipped: int,
  dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Arranges encodings by rows.

  Args:
    found: encodings of images by name, [V, ...].
    cond: encodings of texts by name, [T, ...].
    image: numbers of the rows' images, int [N, A].
    text_number: numbers of the rows' texts, int [N].
    desirable: labels of the rows, bool [N].
    flipped: what to add to an image's number for its mirrored copy; 0 adds no mirrored rows.
    dtypes: of the results by name, if they differ from those of the encodings.

  Returns:
    See `encode_rows`.
  """
  if flipped:
    image = np.concatenate([image, image + flipped])
    text_number, desirable = np.tile(text_number, 2), np.tile(desirable, 2)
  of = dtypes or {}
  return {
    **{name: Gather(values, image, of.get(name)) for name, values in found.items()},
    "cond": {name: Gather(v, text_number, of.get(name)) for name, v in cond.items()},
    "labels": {"desirable": Gather(desirable, np.arange(len(desirable), dtype=np.int32))},
  }


def read_images(images: Sequence[np.ndarray], used: np.ndarray, *, flip: bool) -> Lazy:
  """Returns the images with these numbers, uint8 [V, H, W, 3]; then mirrored, with `flip`."""

  def read(i: int) -> np.ndarray:
    image = images[used[i % len(used)]]
    return image[:, ::-1] if i >= len(used) else image

  shape = images[used[0]].shape if len(used) else (0, 0, 3)
  return Lazy(in_threads(read), (len(used) * (1 + flip), *shape), np.uint8)


def _check_finite(
  rows: RowSet, array: np.ndarray, name: str, is_of: Callable[[int], np.ndarray]
) -> None:
  """Refuses encodings that no update could learn from.

  Args:
    rows: whose images or texts are encoded.
    array: encodings, [V, ...].
    name: 'latents', 'std' or a part of the conditioning.
    is_of: from a place in the array to whether each row has it, bool [N].

  Raises:
    UserError: a value is not finite.
  """
  for i, of in enumerate(array):
    if not np.isfinite(of).all():
      row = int(np.argmax(is_of(i)))
      what, part = (
        ("images", "VAE") if name in ("latents", "std") else ("caption", "text encoder")
      )
      raise UserError(
        f"row {row} of the data ({rows.caption_of(row)!r}): the {part}'s encoding of its "
        f"{what} is not finite; check the weights of the {part}"
      )


def encode_prompts(
  pipeline: Pipeline,
  mesh: Mesh,
  prompts: Sequence[str],
  *,
  size: tuple[int, ...] | None = None,
  batch_size: int = 100,
  negative: bool = False,
) -> Cond:
  """Encodes prompts to the denoiser's conditioning, numpy [N, ...].

  Args:
    pipeline: the text encoders and tokenizers.
    mesh: devices that share a batch.
    prompts: N texts.
    size: height and width of the images in pixels. SDXL is conditioned on it as the original
      and the target size, without a crop. None means the size that it was trained for.
    batch_size: prompts per call; long ones take smaller batches.
    negative: whether they are negative prompts, for which diffusers skips no layers of the text
      encoders, and which some families encode differently.
  """
  run = _text_program(pipeline, size, negative=negative)
  ids = [tokenize(prompts, negative) for tokenize in _tokenizers(pipeline)]
  at_once = min(batch_size, _texts_at_once(ids))
  return in_batches(run, _text_params(pipeline), ids, at_once, mesh)


def each_text(
  pipeline: Pipeline, mesh: Mesh, texts: Sequence[str], *, start: int = 0, batch_size: int = 100
) -> Iterator[tuple[int, Cond]]:
  """Yields what `encode_prompts` returns batch by batch, each after its first number."""
  run, ids = _text_program(pipeline), tokens_of(pipeline, texts)
  at_once = min(batch_size, _texts_at_once(ids))
  yield from each_batch(run, _text_params(pipeline), ids, at_once, mesh, start=start)


def _texts_at_once(ids: Sequence[Any]) -> int:
  """Returns how many texts fit a call; attention takes memory by a text's length squared."""
  longest = max(of.shape[1] for of in ids)
  return max(_TOKEN_PAIRS_AT_ONCE // longest**2, 1)


def tokens_of(pipeline: Pipeline, texts: Sequence[str]) -> list[Lazy]:
  """Returns the texts' ids, see `_tokenizers`, which are made when they are read."""

  def lazy(tokenize: Callable[[Sequence[str], bool], np.ndarray]) -> Lazy:
    length = tokenize([""], False).shape[1]
    read = lambda numbers: tokenize([texts[i] for i in numbers], False)  # noqa: E731
    return Lazy(read, (len(texts), length), np.int32)

  return [lazy(tokenize) for tokenize in _tokenizers(pipeline)]


def _tokenizers(pipeline: Pipeline) -> list[Callable[[Sequence[str], bool], np.ndarray]]:
  """Returns (texts, negative) -> token ids [N, L] of each text encoder, then of the scorer."""
  kinds = pipeline.family.tokenizers(pipeline.modules).values()
  found: list[Callable[[Sequence[str], bool], np.ndarray]] = [
    functools.partial(kind.tokenize, tokenizer)
    for kind, tokenizer in zip(kinds, pipeline.tokenizers, strict=True)
  ]
  if scorer := pipeline.scorer:
    found.append(lambda texts, _: scorer.tokenize(texts))
  return found


def _text_params(pipeline: Pipeline) -> dict[str, Any]:
  return {part: pipeline.params[part] for part in pipeline.encoders}


def _text_program(
  pipeline: Pipeline, size: tuple[int, ...] | None = None, *, negative: bool = False
) -> Callable:
  """Returns a jitted function: (the encoders' parameters, token ids) -> conditioning."""
  skip = 0 if negative else pipeline.clip_skip
  return jax.jit(functools.partial(_encode_ids, pipeline, size, skip))


def _encode_ids(
  pipeline: Pipeline, size: tuple[int, ...] | None, skip: int, params: Any, ids: Any
) -> Cond:
  own = ids[: len(pipeline.encoders)]
  cond = pipeline.family.encode(pipeline.modules, params, own, clip_skip=skip)
  if pipeline.scorer:
    cond["tokens"] = ids[-1]
  if pipeline.family.takes_sizes:
    rows = cond["text"].shape[0]
    cond["time_ids"] = jnp.broadcast_to(time_ids_of(pipeline, size), (rows, 6))
  return cond


def time_ids_of(pipeline: Pipeline, size: tuple[int, ...] | None = None) -> np.ndarray:
  """Returns SDXL's six numbers for images of one size without a crop, float32 [6]."""
  height, width = size or (pipeline.image_size, pipeline.image_size)
  return np.array([height, width, 0, 0, height, width], np.float32)


def make_encoder(pipeline: Pipeline, mesh: Mesh, *, latents: str) -> Callable[[Any], Any]:
  """Makes a function that encodes a batch on the devices.

  Args:
    pipeline: the VAE and the text encoders, whose parameters the devices then hold.
    mesh: devices that share a batch.
    latents: 'mode' or 'sample', see `encode_rows`.

  Returns:
    From a batch with 'images', uint8 [B, A, H, W, 3], and 'ids', token ids [B, L] of each
    encoder and of the pipeline's scorer, to one with 'latents', 'std' and 'cond'; what else it
    has stays. 'time_ids' [B, 6] replace those of `time_ids_of`.
  """
  params = sharding.replicate((pipeline.params["vae"], _text_params(pipeline)), mesh)

  def of_device(params, images, ids):
    posterior = functools.partial(vae_lib.encode_posterior, pipeline.modules["vae"], params[0])
    pixels = images.shape[1] * images.shape[2] * images.shape[3]
    # A few rows at a time: the VAE takes far more memory than they do.
    at_once = min(max(_PIXELS_AT_ONCE // pixels, 1), len(images))
    mode, std = jax.lax.map(posterior, images, batch_size=at_once)
    cond = _encode_ids(pipeline, images.shape[2:4], pipeline.clip_skip, params[1], ids)
    return {"latents": mode, "cond": cond, **({"std": std} if latents == "sample" else {})}

  rows = P(sharding.BATCH_AXES)
  encode = jax.jit(
    jax.shard_map(
      of_device, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False
    )
  )

  def run(batch: Any) -> Any:
    of_images = ("images", "ids", "time_ids")
    rest = {name: of for name, of in batch.items() if name not in of_images}
    found = encode(params, batch["images"], batch["ids"])
    if "time_ids" in batch:
      found["cond"]["time_ids"] = batch["time_ids"]
    return {**rest, **found}

  return run


def encode_no_prompt(
  pipeline: Pipeline, mesh: Mesh, *, size: tuple[int, ...] | None = None
) -> Cond:
  """Encodes the unconditional input that the model was trained with, [1, ...]."""
  cond = dict(encode_prompts(pipeline, mesh, [""], size=size, negative=True))
  if pipeline.zeroes_uncond:
    texts = cond.keys() - {"time_ids"}
    cond |= {name: np.zeros_like(cond[name]) for name in texts}
  return cond


def encode_dropped_prompt(pipeline: Pipeline, mesh: Mesh, kind: str) -> Cond:
  """Encodes what replaces the conditioning of rows whose prompt is dropped.

  Args:
    pipeline: the text encoders and tokenizers.
    mesh: devices for the text encoders.
    kind: 'empty' for the prompt "", 'unconditional' for `encode_no_prompt`. They differ only
      for SDXL, where the unconditional input is zeros.

  Returns:
    One row of conditioning, [1, ...].
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
  done = [out for _, out in each_batch(run, params, rows, size, mesh)]
  return jax.tree.map(lambda *parts: np.concatenate(parts), *done)


def each_batch(
  run: Any, params: Any, rows: Any, size: int, mesh: Mesh, *, start: int = 0
) -> Iterator[tuple[int, Any]]:
  """Yields the number of each batch's first row and its results, see `in_batches`.

  The next batch is read while the devices work.
  """
  total = len(jax.tree.leaves(rows)[0])
  size = sharding.round_up(min(size, total), mesh)
  params = sharding.place_params(params, mesh)
  running: tuple[int, Any] | None = None
  for first in (*range(start, total, size), total):
    watchdog.beat_or_stop()
    now = None
    if first < total:
      index = np.arange(first, first + size).clip(max=total - 1)
      now = first, run(params, sharding.place_batch(rows, mesh, index))
    if running:
      before, out = running
      at_end = total - before
      yield before, jax.tree.map(lambda x, n=at_end: x[:n], sharding.to_host(out))
    running = now
  watchdog.rest()  # the caller compiles next, which takes an unknown time
