"""Experts: the images with captions that DRO and SFT learn from.

Either the best images of a preference data set by its scores, or one's own pictures.
"""

import dataclasses
import difflib
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxpref.errors import UserError

SOURCES = ("shapes", "folder")


@dataclasses.dataclass(frozen=True)
class Example:
  """One image and its caption.

  `image`: uint8 [H, W, 3]; `source`: where it is from, an image's uid or a file's path.
  """

  image: np.ndarray
  caption: str
  source: str


def load_examples(
  source: str, *, path: str, num_experts: int, image_size: int
) -> list[Example]:
  """The experts of a run, all of one size.

  Args:
    source: 'shapes', the best images of the shapes world's train split, or 'folder',
      pictures with captions beside them.
    path: the folder; of no account for 'shapes'.
    num_experts: how many, 0 for all; of a folder's pictures at most so many.
    image_size: height and width in pixels.

  Raises:
    UserError: the source is unknown, holds fewer experts, or nothing of use.
  """
  # Here, since folder.py builds on this file, and TFDS takes a second to import.
  from jaxpref.data import folder  # noqa: PLC0415

  if num_experts < 0:
    raise UserError(f"data.num_experts is {num_experts}, not a number of experts")
  match source:
    case "shapes":
      from jaxpref.data.shapes import builder  # noqa: PLC0415

      best = top_k(builder.load_preferences("train"), num_experts)
      fitted = (folder.fit(Image.fromarray(e.image), image_size) for e in best)
      return [dataclasses.replace(e, image=f) for e, f in zip(best, fitted, strict=True)]
    case "folder":
      return folder.load_folder(path, image_size=image_size, limit=num_experts)
  near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0)[0]
  raise UserError(f"data.source {source!r} is unknown; did you mean {near!r}?")


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
    Example(_decode(source[i.row][i.column]), i.caption, i.uid)
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
    for k in (0, 1):
      yield _Image(
        score=float(values[f"score_{k}"]),
        uid=_text(values[f"image_{k}_uid"]),
        caption=_text(values["caption"]),
        digest=hashlib.sha256(values[f"jpg_{k}"]).digest(),
        row=row,
        column=f"jpg_{k}",
      )


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else value


def _decode(file: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
