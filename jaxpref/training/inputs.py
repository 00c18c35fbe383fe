"""The rows of a run in the form from which its batches are made.

memory: all images and captions are encoded at the start, into the host's memory
disk: encodings of a built data set are read from its caches, see `jaxpref.data.cache`
ahead: images and token ids are read, and each batch is encoded just before its update
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data import built_rows, cache, crops, encode
from jaxpref.data.built_rows import StoredImages
from jaxpref.data.row_set import RowSet
from jaxpref.errors import UserError
from jaxpref.runtime import distributed
from jaxpref.training import programs
from jaxpref.training.setup import Prepared

_MOST_IN_MEMORY = 1 << 32  # bytes of encodings that `data.cache = 'auto'` keeps in memory
_log = logging.getLogger(__name__)


class Part(NamedTuple):
  """The rows whose images have one shape: all of a run's, or those of a bucket.

  Attributes:
    row_set: their images and captions.
    rows: what batches are gathered from, a tree of arrays [N, ...]: encodings, or images and
      token ids. With `data.flip`, mirrored copies follow all other rows.
  """

  row_set: RowSet
  rows: dict[str, Any]


class Inputs(NamedTuple):
  """The rows of a run.

  Attributes:
    parts: the rows of each bucket; one part without buckets.
    encode: from a batch on the devices to a batch of encodings.
    where: 'memory', 'disk' or 'ahead'.
  """

  parts: list[Part]
  encode: Callable[[Any], Any]
  where: str

  def find(self, index: np.ndarray) -> tuple[Part, np.ndarray]:
    """Returns the part that has the rows of a batch, and their indices there.

    Args:
      index: of the rows, as if all parts followed one another, int [B].
    """
    starts = np.cumsum([0, *map(part_length, self.parts)])
    k = int(np.searchsorted(starts, index[0], side="right")) - 1
    return self.parts[k], index - starts[k]


def part_length(part: Part) -> int:
  """Returns the number of rows of a part, with mirrored copies."""
  return len(part.rows["labels"]["desirable"])


def open_rows(prepared: Prepared, before: str = "") -> Inputs:
  """Opens the rows of a run as `data.cache` and `data.buckets` say.

  `setup.check_data` has refused settings that do not suit each other.

  Args:
    prepared: the run's input.
    before: where the rows were encoded when the run began, which 'auto' keeps; '' if it begins.

  Raises:
    UserError: a row cannot be encoded, a cache cannot be written, or the run began otherwise.
  """
  config, pipeline = prepared.config, prepared.pipeline
  row_sets = _by_bucket(prepared) if config.data.buckets else [prepared.rows]
  as_it_is = lambda batch: batch  # noqa: E731

  def opened(encode_batch: Callable[[Any], Any], where: str, rows: list[Any]) -> Inputs:
    parts = [Part(*of) for of in zip(row_sets, rows, strict=True)]
    return Inputs([_with_sizes(part, prepared) for part in parts], encode_batch, where)

  where = "ahead" if config.data.crop == "random" else config.data.cache
  if before and where not in ("auto", before):
    # Not the same bits: caches store half as many, and other batches are encoded together.
    raise UserError(
      f"this workdir's run began with rows encoded as by data.cache = {before!r}: set that, or "
      "choose another --workdir"
    )
  where = before or where
  if where in ("auto", "disk"):
    found = [_from_disk(rows, prepared, make=where == "disk") for rows in row_sets]
    if all(of is not None for of in found):
      return opened(as_it_is, "disk", found)
  if where == "auto":
    size = encoded_bytes(prepared)
    where = "memory" if size <= _MOST_IN_MEMORY or config.data.noise_draws else "ahead"
    if where == "ahead":
      _log.warning(
        "the encoded rows would take %.1f GB of memory: each batch is encoded before its "
        "update; data.cache=disk encodes all rows only once, into files",
        size / 1e9,
      )
  latents = config.data.latents
  if where == "memory":
    models = (pipeline, prepared.mesh)
    of = [
      encode.encode_rows(*models, rows, flip=config.data.flip, latents=latents)
      for rows in row_sets
    ]
    return opened(as_it_is, "memory", of)
  encoder = encode.make_encoder(pipeline, prepared.mesh, latents=latents)
  return opened(encoder, "ahead", [_unencoded(rows, prepared) for rows in row_sets])


def _by_bucket(prepared: Prepared) -> list[RowSet]:
  """Splits the rows into buckets, which have at least a batch of rows, and prints them."""
  config, unit = prepared.config, prepared.pipeline.size_unit
  least = -(-config.train.batch_size // (1 + config.data.flip))
  found = built_rows.by_bucket(prepared.rows, unit=unit, least=least)
  if distributed.is_first():
    sizes = ("{1} x {0}: {2}".format(*built_rows.size_of(rows), len(rows)) for rows in found)
    print(f"rows by width and height: {', '.join(sizes)}", flush=True)
  return found


def _with_sizes(part: Part, prepared: Prepared) -> Part:
  """Replaces SDXL's sizes by those that the data set's images have, if asked for."""
  rows, data, found = part.row_set, prepared.config.data, part.rows
  if not data.original_sizes or not isinstance(rows.images, StoredImages):
    return part
  image = np.concatenate([rows.image] * (1 + data.flip))
  sizes = crops.TimeIds(rows.images, image, mirrored=len(rows) * data.flip)
  if "cond" in found:
    return Part(rows, {**found, "cond": {**found["cond"], "time_ids": sizes}})
  return Part(rows, {**found, "time_ids": sizes})


def encoded_bytes(prepared: Prepared) -> int:
  """Counts the bytes that the rows' encodings take in memory."""
  rows, data = prepared.rows, prepared.config.data
  one = programs.abstract_rows(prepared, 1)
  bytes_of = lambda x, shape: math.prod(shape) * x.dtype.itemsize  # noqa: E731
  images = len(np.unique(rows.image)) * (1 + data.flip) * (1 + ("std" in one))
  texts = len(np.unique(rows.text_numbers()))
  image = bytes_of(one["latents"], one["latents"].shape[2:])
  return images * image + texts * sum(bytes_of(x, x.shape[1:]) for x in one["cond"].values())


def _unencoded(rows: RowSet, prepared: Prepared) -> dict[str, Any]:
  """Returns the rows' images and token ids, which are read when a batch needs them."""
  flip = prepared.config.data.flip
  count = len(rows.images)
  images = encode.read_images(rows.images, np.arange(count), flip=flip)
  ids = encode.tokens_of(prepared.pipeline, _Texts(rows))
  found = encode.by_row(
    *({"images": images}, {str(k): of for k, of in enumerate(ids)}),
    image=rows.image,
    text_number=rows.text_numbers(),
    desirable=rows.desirable,
    flipped=count * flip,
  )
  tokens = found.pop("cond")
  if prepared.config.data.crop == "random" and isinstance(rows.images, StoredImages):
    image = np.concatenate([rows.image] * (1 + flip))
    found["images"] = crops.RandomCrops(rows.images, image, mirrored=len(rows) * flip)
  return {**found, "ids": list(tokens.values())}


class _Texts(Sequence[str]):
  """The texts of rows by number."""

  def __init__(self, rows: RowSet):
    self._rows, self._count = rows, int(rows.text_numbers().max()) + 1

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i):
    return self._rows.text(i)


def _from_disk(rows: RowSet, prepared: Prepared, *, make: bool) -> dict[str, Any] | None:
  """Opens the caches of a built data set; with `make` those that are missing are made.

  Returns:
    The rows; None without a built data set or its caches.
  """
  pipeline, data = prepared.pipeline, prepared.config.data
  if not isinstance(rows.images, StoredImages) or rows.prefixes[0] != rows.prefixes[1]:
    return None
  # Caches do not have a scorer's token ids.
  encoders = dataclasses.replace(pipeline, scorer=None) if pipeline.scorer else pipeline
  latents = cache.find(rows.images, "latents", encoders, flip=data.flip)
  texts = cache.find(rows.images, "text", encoders)
  if not make and (latents is None or texts is None):
    return None
  made = lambda kind: cache.make(rows.images, kind, encoders, prepared.mesh, flip=data.flip)  # noqa: E731
  latents = made("latents") if latents is None else latents
  texts = made("text") if texts is None else texts
  encodings: dict[str, Any] = dict(texts)
  if pipeline.family.takes_sizes:
    sizes = encode.time_ids_of(pipeline, rows.images.size)
    encodings["time_ids"] = np.broadcast_to(sizes, (len(rows.captions), len(sizes)))
  if pipeline.scorer:
    encodings["tokens"] = encode.tokens_of(pipeline, rows.captions)[-1]
  wanted = programs.abstract_rows(prepared, 1)
  found: dict[str, Any] = {name: latents[name] for name in ("latents", "std") if name in wanted}
  cond = {name: encodings[name] for name in wanted["cond"]}
  dtypes = {name: x.dtype for name, x in wanted["cond"].items()}
  return encode.by_row(
    found,
    cond,
    image=rows.image,
    text_number=rows.caption,
    desirable=rows.desirable,
    flipped=len(rows.images) * data.flip,
    dtypes=dtypes | {name: wanted[name].dtype for name in found},
  )
