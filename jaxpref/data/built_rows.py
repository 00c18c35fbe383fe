"""Rows of a built data set, derived from its index without reading an image.

The rules are those of `jaxpref.data.rows`, which reads the rows of any other source: winners,
ties, labels of single images, the best images, and which rows are sampled.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ml_collections import ConfigDict

from jaxpref.data import bad_rows, buckets, image_scores, images
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.row_index import Index
from jaxpref.data.row_set import RowSet
from jaxpref.errors import UserError, count
from jaxpref.runtime.records import Records

CHOSEN_BY = "experts chosen by"  # label of a scorer in the facts about a data set
_REMEMBERED = 64  # records that are kept for the other images of their rows


class BuiltTable(Records):
  """The rows of a built data set, with their index.

  Attributes:
    row_index: of the rows.
    digest: changes with any caption, image or label of the data set.
    about: labels and texts for the report of a run.
  """

  def __init__(
    self, directory: Any, *, advice: str, index: Index, digest: str, about: dict[str, str]
  ):
    """Opens the data set; see `Records`."""
    super().__init__(directory, "train", advice=advice)
    self.row_index, self.digest, self.about = index, digest, about


class StoredImages(Sequence[np.ndarray]):
  """The images of a built data set by number, decoded when they are read.

  Attributes:
    table: the data set.
    size: height and width of the images in pixels, see `images.fit`.
    crop: 'center', 'random' or 'none', as the configuration's `data.crop`.
    numbers: the images of the data set that these are, int [V]; None for all.
  """

  def __init__(
    self,
    table: BuiltTable,
    size: tuple[int, int],
    crop: str = "center",
    numbers: np.ndarray | None = None,
  ):
    """Opens the images; the arguments become the attributes."""
    self.table, self.size, self.crop, self.numbers = table, size, crop, numbers
    self._of = table.row_index.images
    self._record = functools.lru_cache(maxsize=_REMEMBERED)(table.__getitem__)
    self._locks = [threading.Lock() for _ in range(_REMEMBERED)]

  def __len__(self) -> int:
    """Returns the number of different images."""
    return len(self._of) if self.numbers is None else len(self.numbers)

  def __getitem__(self, i):
    """Reads image `i`, uint8 [H, W, 3]; with the crop 'random' that of the centre."""
    return self.read(i, None if self.crop == "none" else 0.5)

  def sizes(self, numbers: np.ndarray) -> np.ndarray:
    """Returns the stored heights and widths of images in pixels, int [B, 2]."""
    numbers = numbers if self.numbers is None else self.numbers[numbers]
    of = self._of.select(["height", "width"]).take(pa.array(numbers))
    return np.stack([column.to_numpy() for column in of.columns], axis=-1)

  def read(self, i: int, place: float | None) -> np.ndarray:
    """Reads image `i`, cropped at a place, see `images.fit`.

    Raises:
      UserError: its file is damaged.
    """
    number = int(i if self.numbers is None else self.numbers[i])
    row, k = (self._of.column(name)[number].as_py() for name in ("row", "column"))
    # Threads read the images of a row at the same time, and its record is read once for all.
    with self._locks[row % len(self._locks)]:
      record = self._record(row)
    try:
      return images.decode(record["jpg" if k < 0 else f"jpg_{k}"], self.size, place)
    except BadRow as error:
      raise UserError(f"{self.table.where(row)} is damaged: {error}") from error


def derive(
  kind: str,
  table: str,
  source: BuiltTable,
  data: ConfigDict,
  *,
  image_size: int,
  seed: int,
  tally: Tally,
) -> RowSet:
  """Derives the rows of a kind, see `rows.load_rows`.

  Args:
    kind: 'pairs', 'experts', 'singles', 'lists' or 'captions'.
    table: of the data set: 'pairs', 'images', 'singles', 'lists' or 'captions'.
    source: the data set.
    data: the configuration's section `data`.
    image_size: height and width in pixels.
    seed: selects rows if there are more than `num_rows` or `num_experts`.
    tally: receives the number of ties.

  Raises:
    UserError: there are not enough rows, or they have only one label.
  """
  index = source.row_index
  limit = data.num_experts if kind in ("experts", "captions") else data.num_rows
  if kind == "captions":
    _, first = np.unique(index.column("caption"), return_index=True)
    chosen = np.sort(first)[_sample(len(first), limit, seed)]
    image = np.empty((len(chosen), 0), np.int32)
    caption, liked = index.gather(["caption"], chosen)[:, 0], np.ones(len(chosen), bool)
  elif kind == "experts" and data.score:
    image, caption, liked = _best_by(data.score, source, limit, table)
  elif kind == "experts" and table == "pairs" and data.experts == "top":
    image, caption, liked = _best(index, limit)
  elif table == "pairs" and kind in ("pairs", "experts"):
    if kind == "pairs" and data.min_change:
      raise UserError("data.min_change needs generated pairs: set data.source=online")
    image, caption, liked = _pairs(index, limit, seed, tally)
    image = image[:, : 1 if kind == "experts" else 2]
  elif table == "pairs":
    image, caption, liked = _singles(index, tally)
    chosen = _sample(len(image), limit, seed)
    image, caption, liked = image[chosen], caption[chosen], liked[chosen]
  elif table == "lists":
    image, caption, liked = _lists(index, limit, seed, data.list_size, tally)
  else:  # images, or labelled images
    order = _order(len(index), limit, seed)
    if kind == "experts" and table == "singles":
      order = order[index.column("liked")[order]]
    chosen = np.sort(order[: limit or None])
    image, caption = _of_rows(index, chosen)
    liked = np.ones(len(chosen), bool)
    if table == "singles":
      liked = index.gather(["liked"], chosen)[:, 0]
  if kind == "singles":
    check_labels(liked, tally.ties)
  prefixes = (data.bad_prefix, data.good_prefix) if kind == "singles" else ("", "")
  parts = (image, caption, liked)
  settings = repr((source.digest, prefixes, image_size, data.crop))
  digest = hashlib.sha256(settings.encode())
  for part in parts:
    digest.update(np.ascontiguousarray(part).tobytes())
  stored = StoredImages(source, (image_size, image_size), data.crop)
  return RowSet(stored, index.captions, *parts, digest.hexdigest()[:16], prefixes)


def by_bucket(rows: RowSet, *, unit: int, least: int) -> list[RowSet]:
  """Splits the rows of a built data set by the proportions of their first images.

  Args:
    rows: whose images are `StoredImages`.
    unit: of which heights and widths are multiples, in pixels.
    least: smallest number of rows of a bucket.

  Returns:
    One set for each bucket; its images have the bucket's size.
  """
  stored = rows.images
  assert isinstance(stored, StoredImages)
  shapes = buckets.shapes_of(stored.size[0], unit)
  bucket = buckets.assign(stored.sizes(rows.image[:, 0]), shapes, least=least)
  found = []
  for k in np.unique(bucket):
    chosen = np.flatnonzero(bucket == k)
    used, image = np.unique(rows.image[chosen], return_inverse=True)
    height, width = shapes[k].tolist()
    part = dataclasses.replace(
      rows,
      images=StoredImages(stored.table, (height, width), stored.crop, used),
      image=image.reshape(len(chosen), -1),
      caption=rows.caption[chosen],
      desirable=rows.desirable[chosen],
    )
    found.append(part)
  return found


def size_of(rows: RowSet) -> tuple[int, int]:
  """Returns the height and width that the images of a built data set are read with."""
  assert isinstance(rows.images, StoredImages)
  return rows.images.size


def check_labels(liked: np.ndarray, ties: int) -> None:
  """Refuses single images that all have the same label.

  Raises:
    UserError: all labels are the same.
  """
  if len(liked) and len(np.unique(liked)) == 1:
    which, other = ("liked", "disliked") if liked[0] else ("disliked", "liked")
    none = f" (no pair has a winner: {ties} ties)" if ties and not liked[0] else ""
    raise UserError(
      f"all images of the data are {which}{none}: the loss needs {other} ones, too"
    )


def _order(total: int, limit: int, seed: int) -> np.ndarray:
  """Returns the order in which rows are taken, see `bad_rows.sample`."""
  order = bad_rows.sample(total, limit, seed)
  # NumPy would make an object of each number of a range first.
  return np.arange(total) if isinstance(order, range) else np.asarray(order)


def _sample(total: int, limit: int, seed: int) -> np.ndarray:
  """Returns the rows to use, in the order of the data."""
  return np.sort(_order(total, limit, seed)[: limit or None])


def _of_rows(index: Index, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the numbers of the images [N, A] and captions [N] of rows, in ascending order."""
  found = index.gather([*index.image_names(), "caption"], chosen)
  return found[:, :-1], found[:, -1]


def _pairs(
  index: Index, limit: int, seed: int, tally: Tally
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, the preferred ones first, and captions of pairs with a winner."""
  lead = index.column("label_0") - index.column("label_1")
  decided, swapped = lead != 0, lead < 0
  order = _order(len(index), limit, seed)
  good = decided[order]
  # Ties after the last row that is needed have not been looked at.
  looked_at = len(order)
  if limit and good.sum() > limit:
    looked_at = int(np.flatnonzero(good)[limit - 1]) + 1
  tally.ties += int(looked_at - good[:looked_at].sum())
  chosen = np.sort(order[:looked_at][good[:looked_at]])
  image, caption = _of_rows(index, chosen)
  image = np.where(swapped[chosen][:, None], image[:, ::-1], image)
  return image, np.ascontiguousarray(caption), np.ones(len(chosen), bool)


def _best(index: Index, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the images [N, 1] with the best scores, and their captions."""
  if lacking := [name for name in ("score_0", "score_1") if name not in index.names]:
    raise UserError(f"experts are chosen by score, but the data lacks {', '.join(lacking)}")
  image, caption = _each_image(index)
  of_pairs = lambda name: np.stack([index.column(name.format(k)) for k in (0, 1)], axis=1)  # noqa: E731
  columns: dict[str, Any] = {"score": of_pairs("score_{}").ravel()}
  keys = [("score", "descending")]
  if "image_0_uid" in index.names:
    columns["uid"] = of_pairs("image_{}_uid").ravel()
    keys.append(("uid", "ascending"))
  order = pc.sort_indices(pa.table(columns), sort_keys=keys).to_numpy()
  order = order[_first_of_each(image[order], caption[order])]
  _check_enough(len(order), limit)
  best = order[: limit or None]
  return image[best, None], caption[best], np.ones(len(best), bool)


def _best_by(
  name: str, source: BuiltTable, limit: int, table: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the images [N, 1] that a scorer prefers, and their captions.

  Equal scores keep the order of the data. Of labelled images only the liked ones are taken.
  """
  index, places = source.row_index, image_scores.places_of(source.row_index)
  file = image_scores.find(source.directory, name)
  scores = image_scores.read(file, digest=source.digest, images=len(places.row))
  can_be = np.isfinite(scores)
  if table == "singles":
    can_be &= index.column("liked")[places.row]
  order = np.flatnonzero(can_be)
  order = order[np.argsort(-scores[order], kind="stable")]
  _check_enough(len(order), 0 if table == "images" else limit)
  best = order[: limit or None]
  source.about[CHOSEN_BY] = image_scores.read_facts(file).key()
  return places.image[best, None], places.caption[best], np.ones(len(best), bool)


def _check_enough(there: int, limit: int) -> None:
  if not there or there < limit:
    raise UserError(
      f"data.num_experts = {limit}, but the data has only "
      f"{count(there, 'image')} to choose from"
    )


def _each_image(index: Index) -> tuple[np.ndarray, np.ndarray]:
  """Returns the image and caption of each image of all pairs, int [2 N] each."""
  image, caption = _of_rows(index, np.arange(len(index)))
  return image.ravel(), np.repeat(caption, 2)


def _first_of_each(image: np.ndarray, caption: np.ndarray) -> np.ndarray:
  """Returns where each image and caption first appears, in order."""
  _, first = np.unique(np.stack([image, caption], axis=1), axis=0, return_index=True)
  return np.sort(first)


def _singles(index: Index, tally: Tally) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each image and caption of pairs once, and whether it won a pair."""
  labels = np.stack([index.column(f"label_{k}") for k in (0, 1)], axis=1)
  tally.ties += int((labels[:, 0] == labels[:, 1]).sum())
  won = (labels > labels[:, ::-1]).ravel()
  image, caption = _each_image(index)
  both = np.stack([image, caption], axis=1)
  _, first, of = np.unique(both, axis=0, return_index=True, return_inverse=True)
  liked = np.zeros(len(first), bool)
  np.logical_or.at(liked, of.ravel(), won)
  order = np.argsort(first)
  return image[first[order], None], caption[first[order]], liked[order]


def _lists(
  index: Index, limit: int, seed: int, size: int, tally: Tally
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the images of ranked lists from best to worst, and their captions."""
  image, caption = _of_rows(index, np.arange(len(index)))
  names = [f"rank_{k}" for k in range(image.shape[1])]
  rank = index.gather(names, np.arange(len(index)))
  found = np.zeros((len(image), size or image.shape[1]), image.dtype)

  def read(i: int) -> int:
    found[i] = image[i, ranked(rank[i], size)]
    return i

  order = bad_rows.sample(len(index), limit, seed)
  good = bad_rows.take(order, read, tally, where="row {}".format, limit=limit)
  return found[good], caption[good], np.ones(len(good), bool)


def ranked(ranks: Sequence[float], size: int) -> list[int]:
  """Returns the places of a list's images to take, from best to worst.

  Of images with equal ranks only the first is taken. Of more than `size` ranks, that many are
  taken at equal distances, with the best and the worst; 0 takes all.

  Raises:
    BadRow: there are fewer than `size` different ranks.
  """
  places: dict[float, int] = {}
  for place, rank in enumerate(ranks):
    places.setdefault(float(rank), place)
  order = sorted(places)
  if len(order) < size:
    raise BadRow(f"fewer than {size} different ranks", str(len(order)))
  if size:
    order = [order[round(j)] for j in np.linspace(0, len(order) - 1, size)]
  return [places[rank] for rank in order]
