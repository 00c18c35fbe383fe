"""Data rows that losses learn from: experts, pairs, labelled singles, ranked lists.

The loss determines the kind of rows (`losses.Needs.rows`), and the configuration's `data`
section determines their source.
"""

import difflib
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data import bad_rows, folder, images, pickapic, top_k
from jaxpref.data.bad_rows import Tally
from jaxpref.errors import UserError

_KINDS_OF = {
  "shapes": ("experts", "captions", "pairs", "singles", "lists"),
  "pickapic": ("experts", "captions", "pairs", "singles"),
  "folder": ("experts", "captions", "pairs", "singles"),
  "online": ("pairs",),
}
SOURCES = tuple(_KINDS_OF)
# The rows of the user's files may be sorted, so a subset of them must be sampled at random. The
# rows of the other sources are independent, so their first rows are already a random sample.
_FILES = ("pickapic", "folder")
_log = logging.getLogger(__name__)


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


def arms_of(kind: str, list_size: int) -> tuple[str, ...]:
  """Returns the arms of a row, which name its images in order."""
  if kind == "lists":
    return tuple(str(rank) for rank in range(1, list_size + 1))
  return {"experts": ("e",), "pairs": ("w", "l"), "singles": ("x",)}[kind]


def load_rows(
  kind: str, data: Any, *, image_size: int, seed: int, tally: Tally | None = None
) -> list[Row]:
  """Loads the rows that a loss learns from.

  Args:
    kind: 'experts', 'pairs', 'singles' or 'lists'; or 'captions' for distinct captions without
      images, of which `num_experts` is the limit, too.
    data: the configuration's `data` section.
    image_size: height and width in pixels.
    seed: selects rows of the user's files if there are more than `num_rows` or `num_experts`.
    tally: counts rows that are left out; by default one that allows `data.max_bad_share`.

  Raises:
    UserError: the source is unknown, has no rows of this kind, has fewer than the configured
      number, or has too many rows that cannot be used.
  """
  _check_source(kind, data)
  tally = tally or make_tally(data)
  try:
    rows = _load(kind, data, image_size, seed if data.source in _FILES else None, tally)
  finally:
    files = data.source == "folder"
    tally.warn(str(data.path) if data.path else data.source, "file" if files else "row")
  for note in tally.read:
    _log.warning("%s: %s", data.path, note)
  wanted = data.num_experts if kind in ("experts", "captions") else data.num_rows
  wanted = 0 if kind == "experts" and data.source == "folder" else wanted
  if len(rows) < max(wanted, 1):
    field = "num_experts" if kind in ("experts", "captions") else "num_rows"
    asked = f"data.{field} = {wanted} asks for more" if wanted else "at least one is needed"
    which = f" of data.min_change = {data.min_change:g} or more" if data.min_change else ""
    ties = f", and {tally.ties} ties" if tally.ties and not rows else ""
    raise UserError(f"the data has {len(rows)} {kind}{which}{ties}: {asked}")
  return rows


def make_tally(data: Any) -> Tally:
  """Makes a tally that allows the configuration's share of bad rows."""
  return Tally(data.max_bad_share)


def _check_source(kind: str, data: Any) -> None:
  if data.source not in SOURCES:
    near = difflib.get_close_matches(data.source, SOURCES, n=1, cutoff=0)[0]
    raise UserError(f"data.source {data.source!r} is unknown; did you mean {near!r}?")
  if data.source == "shapes" and data.path:
    raise UserError(
      f"data.source=shapes does not take data.path = {data.path!r}; did you mean "
      "data.source=folder?"
    )
  if data.source not in _FILES and data.split != "train":
    raise UserError(
      f"data.split = {data.split!r} needs data.source=pickapic or folder: "
      f"data.source={data.source} has no splits to choose from"
    )
  if kind not in _KINDS_OF[data.source]:
    able = ", ".join(s for s in SOURCES if kind in _KINDS_OF[s])
    raise UserError(
      f"data.source={data.source} has no {kind}, which this loss learns from; use {able}"
    )


def _load(kind: str, data: Any, image_size: int, seed: int | None, tally: Tally) -> list[Row]:
  options: dict[str, Any] = {"image_size": image_size, "tally": tally}
  match kind:
    case "captions":
      return [Row((), caption) for caption in _captions(data, seed, tally)]
    case "experts":
      return _experts(data, seed, options)
    case "lists":
      from jaxpref.shapes import rankings  # noqa: PLC0415  # TFDS takes a second

      lists = rankings.load_rankings("train", data.list_size)
      return from_rankings(lists, data.num_rows, **options)
  source = _source_of(data, "pairs", tally)
  if kind == "pairs":
    least = data.min_change
    return from_pairs(source, data.num_rows, seed=seed, min_change=least, **options)
  return [
    row._replace(prefix=data.good_prefix if row.desirable else data.bad_prefix)
    for row in to_singles(source, data.num_rows, seed=seed, **options)
  ]


def _experts(data: Any, seed: int | None, options: Mapping[str, Any]) -> list[Row]:
  if data.source == "folder":
    found = folder.load_folder(
      data.path,
      limit=data.num_experts,
      seed=seed,
      split=data.split,
      follow_links=data.follow_links,
      **options,
    )
  elif data.experts == "top":
    source = _source_of(data, "experts", options["tally"])
    found = top_k.top_k(source, data.num_experts, **options)
  else:
    source = _source_of(data, "pairs", options["tally"])
    return from_pairs(source, data.num_experts, seed=seed, arms=1, **options)
  return [Row((e.image,), e.caption) for e in found]


def _captions(data: Any, seed: int | None, tally: Tally) -> list[str]:
  if data.source == "folder":
    found = folder.load_captions(
      data.path, split=data.split, follow_links=data.follow_links, tally=tally
    )
  else:
    source = _source_of(data, "captions", tally)
    found = bad_rows.take(
      range(len(source)),
      lambda i: bad_rows.caption_of(source[i]["caption"]),
      tally,
      where=bad_rows.named_by(source),
    )
  unique = list(dict.fromkeys(found))
  order = bad_rows.sample(len(unique), data.num_experts, seed)
  return [unique[i] for i in sorted(order[: data.num_experts or None])]


def _source_of(data: Any, kind: str, tally: Tally) -> Sequence[Mapping[str, Any]]:
  """Opens the configured source as rows with Pick-a-Pic's columns."""
  if data.source == "pickapic":
    return pickapic.open_pickapic(data.path, kind, split=data.split, tally=tally)
  if data.source == "folder":
    return folder.open_pairs(
      data.path, split=data.split, follow_links=data.follow_links, tally=tally
    )
  if data.source == "online":
    from jaxpref.data import generated_pairs  # noqa: PLC0415  # TFDS takes a second

    return generated_pairs.open_pairs(data.path)
  from jaxpref.shapes import builder  # noqa: PLC0415  # TFDS takes a second

  return builder.load_preferences("train")


def from_pairs(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  min_change: float = 0.0,
  image_size: int = 0,
  arms: int = 2,
  seed: int | None = None,
  tally: Tally | None = None,
) -> list[Row]:
  """Reads pairs of a preferred and another image; skips ties.

  Args:
    source: rows with Pick-a-Pic's columns.
    limit: number of pairs to read; 0 reads all.
    min_change: skips generated pairs with a smaller `change`.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    arms: 2 for both images, 1 for the preferred image only.
    seed: selects pairs at random if there are more than `limit`; None takes the first ones.
    tally: counts the rows that cannot be used.

  Raises:
    UserError: `min_change` is set and the rows have no column `change`, or too many rows
      cannot be used.
  """
  tally = tally or Tally()

  def read(i: int) -> Row | None:
    values = source[i]
    caption = bad_rows.caption_of(values["caption"])
    if (first := _winner(values)) is None:
      tally.ties += 1
      return None
    if min_change and "change" not in values:
      raise UserError("data.min_change needs generated pairs: set data.source=online")
    if min_change and float(values["change"]) < min_change:
      return None
    columns = [f"jpg_{k}" for k in (first, 1 - first)][:arms]
    return Row(tuple(_decode(values, c, image_size) for c in columns), caption)

  order = bad_rows.sample(len(source), limit, seed)
  return bad_rows.take(order, read, tally, where=bad_rows.named_by(source), limit=limit)


def _winner(values: Mapping[str, Any]) -> int | None:
  """Returns the number of a pair's preferred image, 0 or 1; None for a tie."""
  first, second = (bad_rows.number_of(values[f"label_{k}"], f"label_{k}") for k in (0, 1))
  return None if first == second else int(second > first)


def _decode(values: Mapping[str, Any], column: str, image_size: int) -> np.ndarray:
  if values[column] is None:
    raise bad_rows.BadRow(f"{column} is null")
  return images.decode(values[column], image_size)


def to_singles(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  image_size: int = 0,
  seed: int | None = None,
  tally: Tally | None = None,
) -> list[Row]:
  """Reads each image of a data set of pairs once, with a label.

  An image is desirable if it won at least one pair; images that only lost or tied are not. Two
  images are the same if their files and captions are equal.

  Args:
    source: rows with Pick-a-Pic's columns.
    limit: number of images to read; 0 reads all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    seed: selects images at random if there are more than `limit`; None takes the first ones.
    tally: counts the rows that cannot be used.

  Returns:
    Rows in the order in which their images first appear.

  Raises:
    UserError: all images have the same label, or too many rows cannot be used.
  """
  tally = tally or Tally()
  won: dict[tuple[bytes, str], bool] = {}
  place: dict[tuple[bytes, str], tuple[int, str]] = {}

  def label(i: int) -> None:
    values = source[i]
    caption, winner = bad_rows.caption_of(values["caption"]), _winner(values)
    digests = [top_k.digest_of(values[f"jpg_{k}"], f"jpg_{k}") for k in (0, 1)]
    tally.ties += winner is None
    for k, digest in enumerate(digests):
      won[digest, caption] = won.get((digest, caption), False) or k == winner
      place.setdefault((digest, caption), (i, f"jpg_{k}"))

  where = bad_rows.named_by(source)
  bad_rows.take(range(len(source)), label, tally, where=where)
  unique = list(won)

  def read(j: int) -> Row:
    i, column = place[unique[j]]
    image = _decode(source[i], column, image_size)
    return Row((image,), unique[j][1], won[unique[j]])

  rows = bad_rows.take(
    bad_rows.sample(len(unique), limit, seed),
    read,
    tally,
    where=lambda j: f"{where(place[unique[j]][0])}, {place[unique[j]][1]}",
    limit=limit,
  )
  if rows and len({row.desirable for row in rows}) == 1:
    which, other = ("liked", "disliked") if rows[0].desirable else ("disliked", "liked")
    ties = f" (no pair has a winner: {tally.ties} ties)" if which == "disliked" else ""
    raise UserError(
      f"all images of the data are {which}{ties}: the loss needs {other} ones, too"
    )
  return rows


def from_rankings(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  image_size: int = 0,
  tally: Tally | None = None,
) -> list[Row]:
  """Reads ranked lists of images, sorted from best to worst.

  Args:
    source: rows with `prompt`, `jpg_k` and `rank_k`.
    limit: number of lists to read; 0 reads all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    tally: counts the rows that cannot be used.
  """

  def read(i: int) -> Row:
    values = source[i]
    caption = bad_rows.caption_of(values["prompt"], "prompt")
    ranks = {int(v): name[5:] for name, v in values.items() if name.startswith("rank_")}
    columns = [f"jpg_{ranks[rank]}" for rank in sorted(ranks)]
    return Row(tuple(_decode(values, c, image_size) for c in columns), caption)

  where = bad_rows.named_by(source)
  return bad_rows.take(range(len(source)), read, tally or Tally(), where=where, limit=limit)


def fingerprint(rows: Iterable[Row]) -> str:
  """Returns a digest of all images, captions and labels."""
  digest = hashlib.sha256()
  for row in rows:
    text = (row.prefix + row.caption).encode()
    digest.update(text + b"\0" + b"".join(i.tobytes() for i in row.images))
    if not row.desirable:
      digest.update(b"\1")
  return digest.hexdigest()[:16]
