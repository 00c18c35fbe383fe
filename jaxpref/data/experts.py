"""Experts: the best images of a preference data set by its scores."""

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxpref.errors import UserError

_SCORED = ("score_0", "score_1", "image_0_uid", "image_1_uid")


@dataclasses.dataclass(frozen=True)
class Example:
  """One image and its caption.

  `image`: uint8 [H, W, 3]; `source`: where it is from, an image's uid or a file's path.
  """

  image: np.ndarray
  caption: str
  source: str


def top_k(source: Sequence[Mapping[str, Any]], k: int) -> list[Example]:
  """The best images of a preference data source, each with one caption once.

  Args:
    source: rows with Pick-a-Pic's columns, and `score_0` and `score_1`.
    k: how many, 0 for all.

  Returns:
    From the best score down; of equal scores, from the first uid on.

  Raises:
    UserError: there are not so many.
  """
  ranked = sorted(_images(source), key=lambda image: (-image.score, image.uid))
  first: dict[tuple[bytes, str], _Image] = {}
  for image in ranked:
    first.setdefault((image.digest, image.caption), image)
  unique = list(first.values())
  if not unique or k > len(unique):
    raise UserError(f"the data has {len(unique)} images to pick experts from, not {k}")
  # Pixels are read again, so that only those of the best are ever held.
  return [
    Example(decode(source[i.row][i.column]), i.caption, i.uid)
    for i in (unique[:k] if k else unique)
  ]


@dataclasses.dataclass(frozen=True)
class _Image:
  """What ranks one image of a pair; `row` and `column` say where its pixels are."""

  score: float
  uid: str
  caption: str
  digest: bytes
  row: int
  column: str


def _images(source: Sequence[Mapping[str, Any]]) -> Iterator[_Image]:
  for row in range(len(source)):
    values = source[row]
    if lacking := [c for c in _SCORED if c not in values]:
      raise UserError(f"experts are chosen by score, and the data lacks {', '.join(lacking)}")
    for k in (0, 1):
      yield _Image(
        score=float(values[f"score_{k}"]),
        uid=text_of(values[f"image_{k}_uid"]),
        caption=text_of(values["caption"]),
        digest=hashlib.sha256(values[f"jpg_{k}"]).digest(),
        row=row,
        column=f"jpg_{k}",
      )


def text_of(value: bytes | str) -> str:
  """Text, which data sources give as bytes."""
  return value.decode() if isinstance(value, bytes) else value


def decode(file: bytes) -> np.ndarray:
  """The image in a file's bytes, uint8 [H, W, 3].

  Raises:
    UserError: it is damaged, or none.
  """
  try:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
  except Exception as error:  # of a damaged image Pillow may raise anything
    raise UserError(f"an image of the data cannot be read: {error}") from error
