"""Data rows that losses learn from: experts, pairs, labelled singles, ranked lists.

The loss determines the kind of rows (`losses.Needs.rows`), and the configuration's `data`
section determines their source.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxpref.data import bad_rows, built_rows, images, remote, sources, top_k
from jaxpref.data.bad_rows import Tally
from jaxpref.data.row_set import Row, RowSet, collect
from jaxpref.errors import UserError

_log = logging.getLogger(__name__)


def arms_of(kind: str, list_size: int) -> tuple[str, ...]:
  """Returns the arms of a row, which name its images in order.

  Args:
    kind: of the row, see `losses.Needs`.
    list_size: number of images of a ranked list or of a group.
  """
  if kind in ("lists", "groups"):
    return tuple(str(number) for number in range(1, list_size + 1))
  if kind == "prompts":
    return ()
  single = {"experts": "e", "singles": "x", "scored": "x", "steps": "x"}
  pairs = {"pairs": ("w", "l"), "step_pairs": ("w", "l"), "paths": ("a", "b")}
  return pairs[kind] if kind in pairs else (single[kind],)


def load_rows(
  kind: str, data: ConfigDict, *, image_size: int, seed: int, tally: Tally | None = None
) -> RowSet:
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
  if remote.is_remote(data.path):
    raise UserError(
      f"data.path = {data.path!r}: a run reads local files; copy a built data set to a local "
      "disk, and build others with: python -m jaxpref.data build --path=URL"
    )
  name = sources.name_of(data)
  if name not in ("built", "shapes") and sources.is_built(data.path):
    raise UserError(f"{data.path} is a built data set: leave out data.source = {name!r}")
  # Pairs that an iterative run has generated: there it chose the images that are learned.
  if (
    data.score
    and name != "online"
    and (kind != "experts" or data.experts != "top" or name != "built")
  ):
    raise UserError(
      f"data.score = {data.score!r} chooses experts: it needs a loss that learns from experts, "
      "data.experts=top, and a data.path that is built and scored (python -m jaxpref.data "
      "build, python -m jaxpref.score)"
    )
  source = sources.find_source(name)
  table = _check_source(name, kind, data)
  tally = tally or make_tally(data)
  sorted_ = getattr(source, "SORTED", False)
  try:
    # Winners are chosen by the labels of pairs, not by scores.
    wants = "pairs" if kind == "experts" and data.experts == "winners" else kind
    opened = sources.open_table(name, table, data, tally, wants)
    options = {"image_size": image_size, "tally": tally, "seed": seed if sorted_ else None}
    if isinstance(opened, built_rows.BuiltTable):
      rows = built_rows.derive(
        *(kind, table, opened, data), image_size=image_size, seed=seed, tally=tally
      )
    else:
      rows = collect(_derive(kind, table, opened, data, options))
  finally:
    files = data.source == "folder"
    where = str(data.path or data.source)
    tally.warn(where, "file" if files else "row")
  for note in tally.read:
    _log.warning("%s: %s", where, note)
  wanted = data.num_experts if kind in ("experts", "captions") else data.num_rows
  # All images of a folder of fewer are used; the best of pairs have to be there.
  wanted = 0 if kind == "experts" and table == "images" else wanted
  if len(rows) < max(wanted, 1):
    field = "num_experts" if kind in ("experts", "captions") else "num_rows"
    asked = f"data.{field} = {wanted} asks for more" if wanted else "at least one is needed"
    which = f" of data.min_change = {data.min_change:g} or more" if data.min_change else ""
    ties = f", and {tally.ties} ties" if tally.ties and not rows else ""
    raise UserError(
      f"the data has {len(rows)} {kind}{which}{ties}: {asked} (data.source={data.source}, "
      f"data.path={data.path!r})"
    )
  return rows


def make_tally(data: ConfigDict) -> Tally:
  """Makes a tally that allows the configuration's share of bad rows."""
  return Tally(data.max_bad_share)


def _check_source(name: str, kind: str, data: ConfigDict) -> str:
  """Returns the table from which the rows are derived; refuses what the source cannot do."""
  source = sources.find_source(name)
  if not getattr(source, "SORTED", False) and data.split != "train":
    raise UserError(
      f"data.split = {data.split!r} needs a source of files, such as pickapic or folder: "
      f"data.source={name} has no splits to choose from"
    )
  table = sources.table_for(source, kind, data)
  if table is None and name == "built":
    (there,) = sources.tables_of(source, data)
    raise UserError(
      f"{data.path} is a data set of {there}, and this loss learns from {kind}: {there} have "
      f"{', '.join(sources.TABLES[there])}"
    )
  if table is None:
    able = (s for s in sources.OWN if sources.table_for(sources.find_source(s), kind))
    raise UserError(
      f"data.source={name} has no {kind}, which this loss learns from; use {', '.join(able)}"
    )
  return table


def _derive(
  kind: str, table: str, source: sources.Table, data: ConfigDict, options: dict[str, Any]
) -> list[Row]:
  """Derives rows of a kind from an opened table."""
  limit = data.num_experts if kind in ("experts", "captions") else data.num_rows
  if kind == "captions":
    column = "prompt" if table == "lists" else "caption"
    return [Row((), c) for c in _captions(source, column, limit, options)]
  if kind == "experts":
    return _experts(table, source, limit, data.experts, options)
  if kind == "lists":
    return from_rankings(source, limit, size=data.list_size, **options)
  if kind == "pairs":
    return from_pairs(source, limit, min_change=data.min_change, **options)
  read = from_singles if table == "singles" else to_singles
  return [
    row._replace(prefix=data.good_prefix if row.desirable else data.bad_prefix)
    for row in read(source, limit, **options)
  ]


def _experts(
  table: str, source: sources.Table, limit: int, choice: str, options: dict[str, Any]
) -> list[Row]:
  if table == "singles":
    return from_singles(source, limit, liked=True, **options)
  if table == "pairs" and choice == "winners":
    return from_pairs(source, limit, arms=1, **options)
  if table == "pairs":
    best = {name: options[name] for name in ("image_size", "tally")}
    examples = top_k.top_k(source, limit, **best)
  else:
    examples = top_k.take_examples(source, limit, **options)
  return [Row((e.image,), e.caption) for e in examples]


def _captions(
  source: sources.Table, column: str, limit: int, options: dict[str, Any]
) -> list[str]:
  found = bad_rows.take(
    range(len(source)),
    lambda i: bad_rows.caption_of(source[i][column], column),
    options["tally"],
    where=bad_rows.named_by(source),
  )
  unique = list(dict.fromkeys(found))
  order = bad_rows.sample(len(unique), limit, options["seed"])
  return [unique[i] for i in sorted(order[: limit or None])]


def from_singles(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  liked: bool | None = None,
  image_size: int = 0,
  seed: int | None = None,
  tally: Tally | None = None,
) -> list[Row]:
  """Reads labelled images.

  Args:
    source: rows with `caption`, `jpg` and `liked`.
    limit: number of images to read; 0 reads all.
    liked: reads only images with this label; None reads all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    seed: selects images at random if there are more than `limit`; None takes the first ones.
    tally: counts the rows that cannot be used.

  Raises:
    UserError: too many rows cannot be used, or, of all labels, only one is there.
  """
  tally = tally or Tally()

  def read(i: int) -> Row | None:
    values = source[i]
    if liked is not None and values["liked"] != liked:
      return None
    caption = bad_rows.caption_of(values["caption"])
    return Row((_decode(values, "jpg", image_size),), caption, bool(values["liked"]))

  order = bad_rows.sample(len(source), limit, seed)
  where = bad_rows.named_by(source)
  rows = bad_rows.take(order, read, tally, where=where, limit=limit)
  if liked is None:
    built_rows.check_labels(np.array([row.desirable for row in rows]), tally.ties)
  return rows


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
  built_rows.check_labels(np.array([row.desirable for row in rows]), tally.ties)
  return rows


def from_rankings(
  source: Sequence[Mapping[str, Any]],
  limit: int = 0,
  *,
  size: int = 0,
  image_size: int = 0,
  seed: int | None = None,
  tally: Tally | None = None,
) -> list[Row]:
  """Reads ranked lists of images, sorted from best to worst.

  Of a list with more than `size` ranks, that many are taken at equal distances, with the best
  and the worst. Of images with equal ranks only the first is taken.

  Args:
    source: rows with `prompt`, `jpg_k` and `rank_k`.
    limit: number of lists to read; 0 reads all.
    size: images of a list; 0 takes all.
    image_size: height and width in pixels to crop and resize to; 0 keeps the sizes.
    seed: selects lists at random if there are more than `limit`; None takes the first ones.
    tally: counts the rows that cannot be used.
  """

  def read(i: int) -> Row:
    values = source[i]
    caption = bad_rows.caption_of(values["prompt"], "prompt")
    names = [name for name in values if name.startswith("rank_")]
    best = [names[i] for i in built_rows.ranked([values[name] for name in names], size)]
    return Row(tuple(_decode(values, f"jpg_{n[5:]}", image_size) for n in best), caption)

  where, order = bad_rows.named_by(source), bad_rows.sample(len(source), limit, seed)
  return bad_rows.take(order, read, tally or Tally(), where=where, limit=limit)
