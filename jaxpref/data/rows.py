"""Rows that losses learn from: experts, pairs, labelled singles, ranked lists.

What a row is a loss says (`losses.Needs.rows`); where the images come from the
configuration's `data` section.
"""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxpref.data import experts, folder, pickapic
from jaxpref.errors import UserError

_KINDS_OF = {
  "shapes": ("experts", "captions", "pairs", "singles", "lists"),
  "pickapic": ("experts", "captions", "pairs", "singles"),
  "folder": ("experts", "captions"),
  "online": ("pairs",),
}
SOURCES = tuple(_KINDS_OF)


class Row(NamedTuple):
  """One row of a data set.

  Attributes:
    images: uint8 [H, W, 3], of one size, an arm each.
    caption: of them all.
    desirable: whether the first image is a good one.
    prefix: what the model is told before the caption.
  """

  images: tuple[np.ndarray, ...]
  caption: str
  desirable: bool = True
  prefix: str = ""


def arms_of(kind: str, list_size: int) -> tuple[str, ...]:
  """Suffixes of a row's images, in order."""
  if kind == "lists":
    return tuple(str(rank) for rank in range(1, list_size + 1))
  return {"experts": ("e",), "pairs": ("w", "l"), "singles": ("x",)}[kind]


def load_rows(kind: str, data: Any, *, image_size: int, seed: int) -> list[Row]:
  """The rows of a run.

  Args:
    kind: 'experts', 'pairs', 'singles' or 'lists'; or 'captions', each once and without
      images, of which `num_experts` is the limit as well.
    data: the configuration's section.
    image_size: height and width in pixels.
    seed: of what is drawn, which of the undesirable images are used.

  Raises:
    UserError: the source is unknown, has no such rows, holds fewer, or nothing of use.
  """
  if data.source not in SOURCES:
    near = difflib.get_close_matches(data.source, SOURCES, n=1, cutoff=0)[0]
    raise UserError(f"data.source {data.source!r} is unknown; did you mean {near!r}?")
  if data.source == "shapes" and data.path:
    raise UserError(
      f"data.path = {data.path!r} is not read with data.source=shapes; did you mean "
      "data.source=folder?"
    )
  if kind not in _KINDS_OF[data.source]:
    able = ", ".join(s for s in SOURCES if kind in _KINDS_OF[s])
    raise UserError(
      f"data.source={data.source} has no {kind}, which this loss learns from; {able} has"
    )
  if kind == "captions":
    return [Row((), caption) for caption in _captions(data)]
  if data.source == "folder":
    found = folder.load_folder(data.path, image_size=image_size, limit=data.num_experts)
    return [Row((e.image,), e.caption) for e in found]
  if kind == "lists":
    from jaxpref.data.shapes import rankings  # noqa: PLC0415  # TFDS takes a second

    rows = from_rankings(rankings.load_rankings("train", data.list_size), data.num_rows)
  else:
    source = _pairs_of(data)
    match kind:
      case "experts" if data.experts == "winners":
        pairs = from_pairs(source, data.num_experts)
        rows = [r._replace(images=r.images[:1]) for r in pairs]
      case "experts":
        best = experts.top_k(source, data.num_experts)
        rows = [Row((e.image,), e.caption) for e in best]
      case "pairs":
        rows = from_pairs(source, data.num_rows, min_change=data.min_change)
      case _:
        pairs = from_pairs(source, data.num_rows)  # enough: each has one at least
        rows = to_singles(pairs, share=data.desirable_share, seed=seed)
        rows = [
          r._replace(prefix=data.good_prefix if r.desirable else data.bad_prefix)
          for r in rows[: data.num_rows or None]
        ]
  wanted = data.num_experts if kind == "experts" else data.num_rows
  if len(rows) < max(wanted, 1):
    field = "num_experts" if kind == "experts" else "num_rows"
    asked = f"data.{field} = {wanted} wanted" if wanted else "at least one wanted"
    which = f" of data.min_change = {data.min_change:g} or more" if data.min_change else ""
    raise UserError(f"the data has {len(rows)} {kind}{which}, {asked}")
  return [r._replace(images=tuple(_fit(i, image_size) for i in r.images)) for r in rows]


def _captions(data: Any) -> list[str]:
  if data.source == "folder":
    found: Iterable[str] = folder.load_captions(data.path)
  else:
    source = _pairs_of(data)
    found = (experts.text_of(source[i]["caption"]) for i in range(len(source)))
  unique = list(dict.fromkeys(found))
  if len(unique) < max(data.num_experts, 1):
    raise UserError(f"the data has {len(unique)} captions, not {data.num_experts or 'one'}")
  return unique[: data.num_experts or None]


def _pairs_of(data: Any) -> Sequence[Mapping[str, Any]]:
  """Rows with Pick-a-Pic's columns."""
  if data.source == "pickapic":
    return pickapic.open_pickapic(data.path)
  if data.source == "online":
    from jaxpref.data import online  # noqa: PLC0415  # TFDS takes a second

    return online.open_pairs(data.path)
  from jaxpref.data.shapes import builder  # noqa: PLC0415  # TFDS takes a second

  return builder.load_preferences("train")


def from_pairs(
  source: Sequence[Mapping[str, Any]], limit: int = 0, *, min_change: float = 0.0
) -> list[Row]:
  """Preferred image and other, of rows with Pick-a-Pic's columns; ties are left out.

  Args:
    source: the rows.
    limit: stop after so many, 0 for all.
    min_change: of pairs that `data.online` wrote: those of less `change` are left out.

  Raises:
    UserError: `min_change` is given and the rows do not tell theirs.
  """
  rows: list[Row] = []
  for i in range(len(source)):
    if limit and len(rows) == limit:
      break
    row = source[i]
    if row["label_0"] == row["label_1"]:
      continue
    if min_change and "change" not in row:
      raise UserError("data.min_change is of drawn pairs, with data.source=online")
    if min_change and float(row["change"]) < min_change:
      continue
    first = int(row["label_1"] > row["label_0"])
    images = tuple(experts.decode(row[f"jpg_{k}"]) for k in (first, 1 - first))
    rows.append(Row(images, experts.text_of(row["caption"])))
  return rows


def to_singles(pairs: Iterable[Row], *, share: float, seed: int) -> list[Row]:
  """Each image of a pair by itself: the preferred are desirable, the others are not.

  Args:
    pairs: preferred image and other.
    share: of desirable images among the rows; of the kind of which there are too many a
      random part is left out.
    seed: of which.

  Returns:
    Rows in the order of the pairs.
  """
  good, bad = [], []
  for pair in pairs:
    good.append(Row(pair.images[:1], pair.caption, True))
    bad.append(Row(pair.images[1:], pair.caption, False))
  # The most rows in which the share is as asked.
  total = min(len(good) / share if share else np.inf, len(bad) / (1 - share or 1e-9))
  numbers = (min(round(share * total), len(good)), min(round((1 - share) * total), len(bad)))
  rng = np.random.default_rng(seed)
  kept = [np.sort(rng.permutation(len(good))[:n]) for n in numbers]
  chosen = [(i, good[i]) for i in kept[0]] + [(i, bad[i]) for i in kept[1]]
  return [row for _, row in sorted(chosen, key=lambda item: item[0])]


def from_rankings(source: Sequence[Mapping[str, Any]], limit: int = 0) -> list[Row]:
  """Images from best to worst, of rows with `prompt`, `jpg_k` and `rank_k`.

  The first `limit` such, 0 for all.
  """
  rows = []
  for i in range(min(limit or len(source), len(source))):
    row = source[i]
    ranks = {int(v): name[5:] for name, v in row.items() if name.startswith("rank_")}
    images = tuple(experts.decode(row[f"jpg_{ranks[place]}"]) for place in sorted(ranks))
    rows.append(Row(images, experts.text_of(row["prompt"])))
  return rows


def fingerprint(rows: Iterable[Row]) -> str:
  """Changes with any image, caption or label."""
  digest = hashlib.sha256()
  for row in rows:
    text = (row.prefix + row.caption).encode()
    digest.update(text + b"\0" + b"".join(i.tobytes() for i in row.images))
    if not row.desirable:
      digest.update(b"\1")
  return digest.hexdigest()[:16]


def _fit(image: np.ndarray, size: int) -> np.ndarray:
  return folder.fit(Image.fromarray(image), size)
