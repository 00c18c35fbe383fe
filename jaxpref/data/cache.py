"""Caches of a built data set: encodings of all its images and captions.

A cache belongs to a data set, to the models that made it and to their settings; all of these
are in the name of its directory, `<data set>/cache/latents-<key>` or `text-<key>`, so that
other models never read it. Encodings are in NumPy's own format, of which a run reads what its
batches need. An interrupted cache resumes after the last batch that is known to be on disk.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.data.built_rows import StoredImages
from jaxpref.data.gather import Stored
from jaxpref.data.sources import built
from jaxpref.errors import UserError, first_line, storage_error
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models.pipeline import Pipeline
from jaxpref.runtime import distributed, jax_setup, progress, workdir

_COMPLETE, _PROGRESS = "complete.json", "progress.json"
_ADVICE = "delete it, and it is made again"
_AT_ONCE = 1 << 28  # bytes between two records of the progress


def directory_of(images: StoredImages, kind: str, facts: Mapping[str, Any]) -> Path:
  """Returns the directory of a cache, which may be missing.

  Args:
    images: of the data set.
    kind: 'latents' or 'text'.
    facts: from `facts_of`.
  """
  key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
  return images.table.directory / "cache" / f"{kind}-{key}"


def facts_of(
  images: StoredImages, kind: str, pipeline: Pipeline, *, flip: bool = False
) -> dict[str, Any]:
  """Returns everything that determines a cache's contents, apart from rounding.

  Args:
    images: of the data set.
    kind: 'latents' or 'text'.
    pipeline: whose VAE or text encoders encode.
    flip: whether the cache also has the mirrored images.
  """
  parts = pipeline.encoders
  if kind == "latents":
    vae: Any = pipeline.modules["vae"]
    return {
      "data": images.table.digest,
      "vae": pipeline.part_digests["vae"],
      "scaling": [float(vae.scaling_factor), float(vae.shift_factor)],
      "size": list(images.size),
      "images": "all" if images.numbers is None else _digest(images.numbers),
      "crop": images.crop,
      "flip": flip,
    }
  modules: Any = pipeline.modules
  return {
    "data": images.table.digest,
    "encoders": [pipeline.part_digests[name] for name in parts],
    "dtype": np.dtype(modules[parts[0]].dtype).name,
    "tokens": [[len(t), t.model_max_length] for t in pipeline.tokenizers],
    "clip_skip": pipeline.clip_skip,
  }


def _digest(numbers: np.ndarray) -> str:
  return hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()[:16]


def find(
  images: StoredImages, kind: str, pipeline: Pipeline, *, flip: bool = False
) -> dict[str, Stored] | None:
  """Opens a data set's cache: arrays by name, which read what is asked for; or None.

  Args:
    images: of the data set.
    kind: 'latents', with 'latents' (the posteriors' modes) and 'std', [V, C, h, w], or 'text',
      with 'text' and, for SDXL, 'pooled', [T, ...].
    pipeline: the models of the run.
    flip: whether mirrored images are needed, which follow all others.

  Raises:
    UserError: a file is damaged.
  """
  facts = _finished(images, kind, pipeline, flip=flip)
  return None if facts is None else _read(images, kind, facts)


def _finished(
  images: StoredImages, kind: str, pipeline: Pipeline, *, flip: bool
) -> dict[str, Any] | None:
  """Returns the facts of a finished cache that has what is needed; see `find`."""
  # One with the mirrored images serves a run without them, too.
  for mirrored in (flip, True) if kind == "latents" else (False,):
    facts = facts_of(images, kind, pipeline, flip=mirrored)
    if (directory_of(images, kind, facts) / _COMPLETE).exists():
      return facts
  return None


def _read(images: StoredImages, kind: str, facts: Mapping[str, Any]) -> dict[str, Stored]:
  where = directory_of(images, kind, facts)
  found = workdir.read_json(where / _COMPLETE, _is_record)
  if found["facts"] != dict(facts):
    raise UserError(f"{where} is of other models or data; delete it")
  arrays = {}
  for name, (shape, dtype) in found["arrays"].items():
    try:
      array = Stored(where / f"{name}.npy")
    except (OSError, ValueError) as error:
      raise UserError(f"{where} is damaged: {first_line(error)}; {_ADVICE}") from error
    if array.shape != tuple(shape) or array.dtype != dtype:
      raise UserError(
        f"{where} is damaged: {name}.npy is {array.dtype} {array.shape}; {_ADVICE}"
      )
    arrays[name] = array
  return arrays


def _is_record(value: Any) -> bool:
  return isinstance(value, dict) and value.keys() == {"facts", "arrays"}


def make(
  images: StoredImages,
  kind: str,
  pipeline: Pipeline,
  mesh: Mesh,
  *,
  flip: bool = False,
  dtype: str = "float16",
) -> dict[str, Stored]:
  """Makes a cache, or resumes an interrupted one. All processes call it; one writes.

  Args:
    images: of the data set.
    kind: 'latents' or 'text'.
    pipeline: the VAE and the text encoders.
    mesh: devices that share a batch.
    flip: also encodes the mirrored images.
    dtype: 'float16' or 'float32', of the stored numbers.

  Returns:
    See `find`.

  Raises:
    UserError: it cannot be written, or an encoding is not finite in this dtype.
    StoppedError: the run was asked to stop.
  """
  facts = facts_of(images, kind, pipeline, flip=flip and kind == "latents")
  where = directory_of(images, kind, facts)
  captions = images.table.row_index.captions
  if kind == "latents":
    batches = lambda start: _latents(images, pipeline, mesh, start, flip=flip)  # noqa: E731
    total, noun = len(images) * (1 + flip), "image"
  else:
    batches = lambda start: _texts(captions, pipeline, mesh, start)  # noqa: E731
    total, noun = len(captions), "caption"
  done = distributed.first(lambda: _begun(where, facts, dtype))
  arrays: dict[str, np.ndarray] = {}
  unsaved = 0
  with progress.progress_bar(total=total, initial=done, unit=noun, desc=f"{kind} cache") as bar:
    for start, found in batches(done):
      count = len(next(iter(found.values())))
      for name, of in found.items():
        _check(of, name, dtype, start, where)
      if distributed.is_first():
        if not arrays:
          arrays = _open(where, found, total, dtype, new=not done)
        for name, of in found.items():
          arrays[name][start : start + count] = of
        unsaved += sum(of.nbytes for of in found.values())
        if unsaved > _AT_ONCE:
          _record(where, arrays, facts, dtype, start + count)
          unsaved = 0
      bar.update(count)
  distributed.first(lambda: _finish(where, facts))
  return _read(images, kind, facts)


def make_with_model(
  directory: Path,
  kinds: Sequence[str],
  model: str,
  *,
  vae: str = "",
  dtype: str = "float32",
  clip_skip: int = 0,
  image_size: int = 0,
  flip: bool = False,
  crop: str = "center",
  stored_dtype: str = "float16",
) -> list[Path]:
  """Makes the caches of a built data set that are missing.

  Args:
    directory: of the data set.
    kinds: of 'latents' and 'text'.
    model: as the configuration's `model.path`.
    vae: as `model.vae`.
    dtype: as `model.dtype`.
    clip_skip: as `model.clip_skip`.
    image_size: as `model.image_size`.
    flip: also encodes the mirrored images.
    crop: as `data.crop`, 'center' or 'none'.
    stored_dtype: 'float16' or 'float32'.

  Returns:
    The directories of the caches.

  Raises:
    UserError: the data set or the model cannot be used.
  """
  jax_setup.cache_programs()
  mesh = sharding.make_mesh()
  pipeline = pipeline_lib.load_pipeline(
    model,
    dtype=jnp.dtype(dtype),
    mesh=mesh,
    vae=vae,
    clip_skip=clip_skip,
    image_size=image_size,
    without_denoiser=True,
  )
  images = StoredImages(built.open_set(str(directory)), (pipeline.image_size,) * 2, crop)
  found = []
  for kind in kinds:
    facts = _finished(images, kind, pipeline, flip=flip)
    if facts is None:
      make(images, kind, pipeline, mesh, flip=flip, dtype=stored_dtype)
      facts = facts_of(images, kind, pipeline, flip=flip and kind == "latents")
    found.append(directory_of(images, kind, facts))
  return found


def _begun(where: Path, facts: Mapping[str, Any], dtype: str) -> int:
  """Returns how many items an interrupted cache has on disk."""
  where.mkdir(parents=True, exist_ok=True)
  if not (where / _PROGRESS).exists():
    return 0
  found = workdir.read_json(where / _PROGRESS, lambda value: isinstance(value, dict))
  same = found.get("facts") == dict(facts) and found.get("dtype") == dtype
  return int(found["done"]) if same else 0


def _open(
  where: Path, found: Mapping[str, np.ndarray], total: int, dtype: str, *, new: bool
) -> dict[str, np.ndarray]:
  """Opens the files for writing; their whole size is reserved at once."""
  arrays: dict[str, np.ndarray] = {}
  for name, of in found.items():
    path = where / f"{name}.npy"
    shape = (total, *of.shape[1:])
    try:
      if new:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("rb+") as file:
          # A full disk would end the process while it writes to the map.
          os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
      else:
        array = np.lib.format.open_memmap(path, "r+")
    except OSError as error:
      path.unlink(missing_ok=True)
      raise storage_error(f"cannot write {path}: {error}", error) from error
    arrays[name] = array
  return arrays


def _record(
  where: Path, arrays: Mapping[str, Any], facts: Mapping[str, Any], dtype: str, done: int
) -> None:
  for array in arrays.values():
    array.flush()
  workdir.write_json(where / _PROGRESS, {"done": done, "facts": dict(facts), "dtype": dtype})


def _finish(where: Path, facts: Mapping[str, Any]) -> None:
  arrays = {}
  for path in sorted(where.glob("*.npy")):
    array = np.lib.format.open_memmap(path, "r+")
    array.flush()
    arrays[path.stem] = (list(array.shape), array.dtype.name)
  workdir.write_json(where / _COMPLETE, {"facts": dict(facts), "arrays": arrays})
  (where / _PROGRESS).unlink(missing_ok=True)


def _check(array: np.ndarray, name: str, dtype: str, start: int, where: Path) -> None:
  """Refuses encodings that are not finite, in the model or in the stored dtype."""
  with np.errstate(over="ignore"):
    finite = np.isfinite(array.astype(dtype)).reshape(len(array), -1).all(axis=1)
  if not finite.all():
    number = start + int(np.argmin(finite))
    raise UserError(
      f"{where}: {name} number {number} is not finite as {dtype}; check the weights, or store "
      "float32"
    )


def _latents(
  images: StoredImages, pipeline: Pipeline, mesh: Mesh, start: int, *, flip: bool
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  pictures = encode.read_images(images, np.arange(len(images)), flip=flip)
  for first, (mode, std) in encode.each_posterior(pipeline, mesh, pictures, start=start):
    yield first, {"latents": mode, "std": std}


def _texts(
  captions: Sequence[str], pipeline: Pipeline, mesh: Mesh, start: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  for first, cond in encode.each_text(pipeline, mesh, captions, start=start):
    yield first, {name: of for name, of in cond.items() if name != "time_ids"}
