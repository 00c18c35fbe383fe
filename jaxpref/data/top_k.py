"""Selection of experts: the images of a preference data set with the best scores."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data import bad_rows, images
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.errors import UserError, count

_SCORED = ("score_0", "score_1")


@dataclasses.dataclass(frozen=True)
class Example:
  """One image and its caption.

  Attributes:
    image: uint8 [H, W, 3].
    caption: the image's caption.
    source: the image's uid, or the path of its file.
  """

  image: np.ndarray
  caption: str
  source: str


def top_k(
  source: Sequence[Mapping[str, Any]],
  k: int,
  *,
  image_size: int = 0,
  tally: Tally | None = None,
) -> list[Example]:
  """Chooses the best images of a preference data set, each image and caption once.

  Args:
    source: rows with Pick-a-Pic's columns, `score_0` and `score_1`.
    k: number of images; 0 chooses all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    tally: counts images that cannot be used; the next best replace them.

  Returns:
    Examples by decreasing score; equal scores are sorted by uid, if there is one.

  Raises:
    UserError: there are fewer than `k` images, or too many of them cannot be used.
  """
  tally = tally or Tally()
  ranked = sorted(_images(source, tally), key=lambda image: (-image.score, image.uid))
  first: dict[tuple[bytes, str], _Image] = {}
  for image in ranked:
    first.setdefault((image.digest, image.caption), image)
  unique = list(first.values())

  def read(rank: int) -> tuple[int, Example]:
    # Reads the pixels again, so that memory only ever holds those of the best images.
    of = unique[rank]
    pixels = images.decode(source[of.row][of.column], image_size)
    return rank, Example(pixels, of.caption, of.uid)

  where = bad_rows.named_by(source)
  best = bad_rows.take(
    range(len(unique)),
    read,
    tally,
    where=lambda rank: f"{where(unique[rank].row)}, {unique[rank].column}",
    limit=k,
    place=lambda rank: (unique[rank].row, unique[rank].column),
  )
  if not best or len(best) < k:
    raise UserError(
      f"data.num_experts = {k}, but the data has only "
      f"{count(len(best), 'image')} to choose from"
    )
  return [example for _, example in sorted(best, key=lambda found: found[0])]


def take_examples(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  image_size: int = 0,
  seed: int | None = None,
  tally: Tally | None = None,
) -> list[Example]:
  """Reads images with captions.

  Args:
    source: rows with `caption` and `jpg`.
    limit: number of images to read; 0 reads all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    seed: selects images at random if there are more than `limit`; None reads the first ones.
    tally: counts the rows that cannot be used.

  Returns:
    Examples in the order of the source, each with its name there as `source`.

  Raises:
    UserError: too many rows cannot be used.
  """
  tally = tally or Tally()
  where, counted = bad_rows.named_by(source), tally.left_out.total()

  def read(i: int) -> Example:
    row = source[i]
    caption = bad_rows.caption_of(row["caption"])
    return Example(images.decode(row["jpg"], image_size), caption, where(i))

  order = bad_rows.sample(len(source), limit, seed)
  examples = bad_rows.take(order, read, tally, where=where, limit=limit)
  if limit and len(source) > limit and len(examples) == limit:
    which = "a random sample, by the seed" if seed is not None else f"the first {limit}"
    tally.read.append(f"{limit} of {len(source)} images are used, {which}")
  lost = getattr(source, "lost", 0)  # which the table does not have
  tally.check(tally.left_out.total() - counted + lost, len(source) + lost)
  return examples


@dataclasses.dataclass(frozen=True)
class _Image:
  """The score of one image of a pair; `row` and `column` locate its pixels."""

  score: float
  uid: str
  caption: str
  digest: bytes
  row: int
  column: str


def _images(
  source: Sequence[Mapping[str, Any]], tally: Tally | None = None
) -> Iterator[_Image]:
  row_of = functools.lru_cache(maxsize=1)(source.__getitem__)  # both images are of one row

  def read(i: int) -> _Image:
    row, k = divmod(i, 2)
    values = row_of(row)
    if lacking := [c for c in _SCORED if c not in values]:
      raise UserError(f"experts are chosen by score, but the data lacks {', '.join(lacking)}")
    return _Image(
      score=bad_rows.number_of(values[f"score_{k}"], f"score_{k}"),
      uid=_uid(values.get(f"image_{k}_uid")),
      caption=bad_rows.caption_of(values["caption"]),
      digest=digest_of(values[f"jpg_{k}"], f"jpg_{k}"),
      row=row,
      column=f"jpg_{k}",
    )

  where = bad_rows.named_by(source)
  indices = range(2 * len(source))
  yield from bad_rows.take(
    indices, read, tally or Tally(), where=lambda i: f"{where(i // 2)}, image {i % 2}"
  )


def _uid(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  return "" if value is None else str(value)


def digest_of(image: bytes | Path | None, column: str) -> bytes:
  """Returns the SHA-256 digest of an image file's content.

  Raises:
    BadRow: the image is null, or its file cannot be read.
  """
  if image is None:
    raise BadRow(f"{column} is null")
  if isinstance(image, Path):
    with images.open_regular(image) as stream:
      return hashlib.sha256(stream.read()).digest()
  return hashlib.sha256(image).digest()


def text_of(value: bytes | str) -> str:
  """Returns text; decodes the bytes that data sources give."""
  return value.decode() if isinstance(value, bytes) else value
