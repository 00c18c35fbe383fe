"""The rows that a run learns from: numbers of images and captions, which are read when needed.

Small data sets have their images in memory; a built data set reads them from its files. What
encodes and trains sees no difference.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpref.errors import UserError, count


class Row(NamedTuple):
  """One row of a data set.

  Attributes:
    images: one image per arm, uint8 [H, W, 3], all of one size.
    caption: the caption of all images.
    desirable: whether the first image is a good one.
    prefix: text that is put before the caption when it is encoded.
  """

  images: tuple[np.ndarray, ...]
  caption: str
  desirable: bool = True
  prefix: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class RowSet(Sequence[Row]):
  """N rows with A images each.

  Attributes:
    images: images by number, uint8 [H, W, 3] each.
    captions: captions by number.
    image: numbers of the rows' images, int [N, A].
    caption: numbers of the rows' captions, int [N].
    desirable: whether a row's first image is a good one, bool [N].
    prefixes: texts put before the captions of rows that are not desirable, and that are.
    digest: of all images, captions and labels.
  """

  images: Sequence[np.ndarray]
  captions: Sequence[str]
  image: np.ndarray
  caption: np.ndarray
  desirable: np.ndarray
  digest: str
  prefixes: tuple[str, str] = ("", "")

  def __len__(self) -> int:
    """Returns the number of rows."""
    return len(self.caption)

  def __getitem__(self, i):
    """Returns row `i` with its images."""
    images = tuple(self.images[number] for number in self.image[i])
    liked = bool(self.desirable[i])
    return Row(images, self.caption_of(i), liked, self.prefixes[liked])

  def caption_of(self, i: int) -> str:
    """Returns the caption of row `i` without reading its images."""
    return self.captions[self.caption[i]]

  def text_numbers(self) -> np.ndarray:
    """Returns the numbers of the rows' texts, for `text`, int [N]."""
    if self.prefixes[0] == self.prefixes[1]:
      return self.caption
    return self.caption + len(self.captions) * self.desirable

  def text(self, number: int) -> str:
    """Returns a caption after its prefix."""
    liked, caption = divmod(int(number), len(self.captions))
    return self.prefixes[liked] + self.captions[caption]

  def used_captions(self) -> Sequence[str]:
    """Returns the captions that rows have, each once, in the order of the rows."""
    _, first = np.unique(self.caption, return_index=True)
    return _Chosen(self.captions, self.caption[np.sort(first)])

  def has_caption_in(self, texts: Iterable[str]) -> bool:
    """Tells whether a row's caption is one of these texts; white space does not count."""
    wanted = {" ".join(text.split()) for text in texts}
    return any(" ".join(caption.split()) in wanted for caption in self.used_captions())


@dataclasses.dataclass(frozen=True)
class _Chosen(Sequence[str]):
  """Some of many texts, by number."""

  texts: Sequence[str]
  numbers: np.ndarray

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, i):
    return self.texts[self.numbers[i]]


def collect(rows: Sequence[Row]) -> RowSet:
  """Makes a set of rows whose images are in memory."""
  numbers: dict[str, int] = {}
  caption = [numbers.setdefault(row.caption, len(numbers)) for row in rows]
  arms = len(rows[0].images) if rows else 0
  prefixes = ["", ""]
  for row in rows:
    prefixes[row.desirable] = row.prefix
  return RowSet(
    images=[image for row in rows for image in row.images],
    captions=list(numbers),
    image=np.arange(len(rows) * arms).reshape(len(rows), arms),
    caption=np.array(caption, np.int64),
    desirable=np.array([row.desirable for row in rows], bool),
    prefixes=(prefixes[0], prefixes[1]),
    digest=fingerprint(rows),
  )


def hold_out(rows: RowSet, least: int, *, seed: int) -> tuple[RowSet, RowSet]:
  """Splits rows by their captions, at random.

  Args:
    rows: N rows.
    least: number of rows to hold out, and more until no caption is on both sides.
    seed: of the choice.

  Returns:
    The rows to train on, and those held out, each in their order.

  Raises:
    UserError: less than half of the rows would be left to train on.
  """
  numbers: dict[str, int] = {}  # white space does not count
  words = [" ".join(rows.caption_of(i).split()) for i in range(len(rows))]
  group = np.array([numbers.setdefault(text, len(numbers)) for text in words], np.int64)
  order = np.random.default_rng(seed).permutation(len(numbers))
  sizes = np.bincount(group, minlength=len(order))[order]
  chosen = order[: np.searchsorted(np.cumsum(sizes), least) + 1]
  held = np.isin(group, chosen)
  if 2 * held.sum() > len(rows):
    raise UserError(
      f"judge.held_out = {least} leaves {count(int((~held).sum()), 'row')} of {len(rows)} to "
      f"train on, since rows of one caption stay together ({count(len(order), 'caption')}): "
      "lower it, or take more data"
    )
  rest, out = (
    dataclasses.replace(
      rows, image=rows.image[of], caption=rows.caption[of], desirable=rows.desirable[of]
    )
    for of in (~held, held)
  )
  return rest, out


def fingerprint(rows: Iterable[Row]) -> str:
  """Returns a digest of all images, captions and labels."""
  digest = hashlib.sha256()
  for row in rows:
    text = (row.prefix + row.caption).encode()
    digest.update(text + b"\0" + b"".join(i.tobytes() for i in row.images))
    if not row.desirable:
      digest.update(b"\1")
  return digest.hexdigest()[:16]
