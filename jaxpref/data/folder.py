"""The user's own images, a folder of them with captions, as experts or as pairs.

At any depth, a caption is in `name.txt` or `name.caption` beside `name.jpg`, in `caption.txt`
beside the one image of a folder, or in a column of `metadata.jsonl`, `.csv` or `.parquet`,
whose `file_name` is relative to it. A pair is `name_w.png` and `name_l.png`, or equal names
in folders `w` and `l`, with one caption. What cannot be used is counted and named in one
warning, and the rest is used. Nothing outside the folder is read, unless links are followed.
"""

import csv
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref import wording
from jaxpref.data import bad_rows, images, parquet, splits
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.top_k import Example
from jaxpref.errors import UserError, first_line
from jaxpref.paths import user_path

_CAPTIONS = (".txt", ".caption")  # the first goes before the second
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_COLUMNS = ("text", "caption", "prompt")  # of captions; the first that is there
_WINNERS, _LOSERS = ("w", "win", "winner", "chosen"), ("l", "lose", "loser", "rejected")
_SIDE = re.compile(rf"(?:(.+)_)?({'|'.join((*_WINNERS, *_LOSERS))})", re.IGNORECASE)
_LINK = BadRow("a link out of the folder", "copy it there, or set data.follow_links")


class _Entry(NamedTuple):
  """An image, and its caption or the file that holds it."""

  image: Path
  caption: Path | str


class _Pair(NamedTuple):
  """Two images of one caption."""

  winner: Path
  loser: Path
  caption: Path | str


class _Found(NamedTuple):
  """What is in a folder.

  Attributes:
    entries: images with captions; of pairs the winners.
    pairs: of images.
    skipped: names of what cannot be used as an entry or an image of a pair, and why.
    alone: the same of entries only.
    odd: the same of pairs only.
    notes: how captions and pairs were found, where it is not by `.txt` files alone.
  """

  entries: list[_Entry]
  pairs: list[_Pair]
  skipped: list[tuple[str, BadRow]]
  alone: list[tuple[str, BadRow]]
  odd: list[tuple[str, BadRow]]
  notes: list[str]


def load_folder(
  path: str | os.PathLike,
  *,
  image_size: int,
  limit: int = 0,
  seed: int | None = None,
  caption: str | None = None,
  split: str = splits.ALL,
  follow_links: bool = False,
  option: str = "data.path",
  hint: str = "",
  tally: Tally | None = None,
) -> list[Example]:
  """Reads the images of a folder that have captions.

  Args:
    path: the folder.
    image_size: height and width in pixels that all are brought to, see `images.fit`.
    limit: number of images wanted; 0 reads all.
    seed: of which, where there are more; None takes the first.
    caption: of all images, which then need none beside them.
    split: which of its folders, where they are named by split; see `splits.choose`.
    follow_links: whether links that lead out of the folder are followed.
    option: that named the folder, for messages.
    hint: what else to do where no image has a caption, for a message.
    tally: of what cannot be used; by default a warning names it.

  Returns:
    Examples in order of their paths, which, relative to the folder, are their `source`.

  Raises:
    UserError: there is no such folder, nothing in it can be used, or too little.
  """
  root = _root(path, option)
  warns, tally = tally is None, tally or Tally()
  if caption is None:
    found = _scan(root, split, follow_links)
    entries, skipped = found.entries, [*found.skipped, *found.alone]
    tally.read += found.notes
  else:
    files, skipped = _walk(root, follow_links)
    entries = [_Entry(p, caption) for p in _images(files)]
  for name, reason in skipped:
    tally.leave_out(name, reason)

  def name_of(i: int) -> str:
    return entries[i].image.relative_to(root).as_posix()

  def read(i: int) -> Example:
    text = _read_caption(entries[i].caption)
    return Example(images.decode(entries[i].image, image_size), text, name_of(i))

  order = bad_rows.sample(len(entries), limit, seed)
  examples = bad_rows.take(order, read, tally, where=name_of, limit=limit)
  if limit and len(entries) > limit and len(examples) == limit:
    which = "a random sample, by the seed" if seed is not None else "the first"
    tally.read.append(f"{limit} of {len(entries)} images are used, {which}")
  tally.check(tally.left_out.total(), len(entries) + len(skipped))
  if warns:
    tally.warn(str(root), "file")
  if not examples:
    raise UserError(
      f"no image in {root} can be used"
      if caption is not None
      else f"no image with a caption in {root}: it takes name.jpg beside name.txt or "
      "name.caption, NNN/caption.txt beside one image, or metadata.jsonl"
      f"{'; see the warning' if tally.left_out else ''}{hint}"
    )
  return examples


def count_images(path: str | os.PathLike) -> int:
  """How many images there are in a folder, of use or not."""
  return len(_images(_walk(user_path(path), follow_links=False)[0]))


def load_captions(
  path: str | os.PathLike,
  *,
  split: str = splits.ALL,
  follow_links: bool = False,
  tally: Tally | None = None,
) -> list[str]:
  """Reads the captions of a folder's images, in order of their paths, and no image.

  Args:
    path: the folder.
    split: see `load_folder`.
    follow_links: see `load_folder`.
    tally: of what cannot be used.

  Raises:
    UserError: there is no such folder, no caption in it, or too little of use.
  """
  root, tally = _root(path, "data.path"), tally or Tally()
  found = _scan(root, split, follow_links)
  tally.read += found.notes
  for name, reason in (*found.skipped, *found.alone):
    tally.leave_out(name, reason)
  captions = bad_rows.take(
    range(len(found.entries)),
    lambda i: _read_caption(found.entries[i].caption),
    tally,
    where=lambda i: found.entries[i].image.relative_to(root).as_posix(),
  )
  if not captions:
    raise UserError(f"no image with a caption in {root}")
  return captions


class FolderPairs(Sequence[Mapping[str, Any]]):
  """Pairs of a folder, with Pick-a-Pic's columns; images are paths, image 0 the winner."""

  def __init__(self, root: Path, pairs: Sequence[_Pair]):
    self._root, self._pairs = root, pairs

  def __len__(self) -> int:
    """All pairs."""
    return len(self._pairs)

  def __getitem__(self, index):
    """A pair, whose caption is read now.

    Raises:
      BadRow: the caption cannot be used.
    """
    pair = self._pairs[index]
    return {
      "caption": _read_caption(pair.caption),
      "jpg_0": pair.winner,
      "jpg_1": pair.loser,
      "label_0": 1.0,
      "label_1": 0.0,
    }

  def where(self, index: int) -> str:
    """The winner's path."""
    return self._pairs[index].winner.relative_to(self._root).as_posix()


def open_pairs(
  path: str | os.PathLike, *, split: str, follow_links: bool, tally: Tally
) -> FolderPairs:
  """Finds the pairs of a folder.

  Args:
    path: the folder.
    split: see `load_folder`.
    follow_links: see `load_folder`.
    tally: of what cannot be used.

  Raises:
    UserError: there is no such folder, no pair in it, or too little of use.
  """
  root = _root(path, "data.path")
  found = _scan(root, split, follow_links)
  tally.read += found.notes
  left_out = (*found.skipped, *found.odd)
  for name, reason in left_out:
    tally.leave_out(name, reason)
  if not found.pairs:
    raise UserError(
      f"no pairs in {root}: it takes name_w.png and name_l.png, or equal names in folders w "
      "and l, with a caption in name.txt; winner and loser, chosen and rejected will do, too"
    )
  tally.check(len(left_out), len(left_out) + len(found.pairs))
  return FolderPairs(root, found.pairs)


def _root(path: str | os.PathLike, option: str) -> Path:
  root = user_path(path)
  if not os.fspath(path) or not root.is_dir():
    raise UserError(f"{option} {os.fspath(path)!r} is not a folder")
  return root


def _walk(
  root: Path, follow_links: bool
) -> tuple[dict[Path, list[Path]], list[tuple[str, BadRow]]]:
  """Regular files by folder, sorted, without hidden ones; and what was passed over, and why.

  A link to what is in the folder is not followed either: it is read by its own path.
  """
  home, seen = os.path.realpath(root), set()
  found: dict[Path, list[Path]] = {}
  skipped: list[tuple[str, BadRow]] = []
  used = {*images.suffixes(), *_CAPTIONS}

  def leads_out(path: Path) -> bool:
    return not Path(os.path.realpath(path)).is_relative_to(home)

  def relative(path: str | Path) -> str:
    return Path(path).relative_to(root).as_posix()

  def unreadable(error: OSError) -> None:
    skipped.append((relative(error.filename), BadRow("cannot be read", first_line(error))))

  for place, folders, files in os.walk(root, followlinks=follow_links, onerror=unreadable):
    directory = Path(place)
    if (real := os.path.realpath(place)) in seen:  # a loop of links
      folders.clear()
      continue
    seen.add(real)
    inner = []
    for name in sorted(f for f in folders if not _is_hidden(f)):
      path = directory / name
      if not path.is_symlink() or (leads_out(path) and follow_links):
        inner.append(name)
      elif leads_out(path):
        skipped.append((relative(path), _LINK))
    folders[:] = inner
    for name in sorted(f for f in files if not _is_hidden(f)):
      path = directory / name
      if path.suffix.lower() not in used and name not in _METADATA:
        continue
      if path.is_symlink() and not follow_links and leads_out(path):
        skipped.append((relative(path), _LINK))
      elif path.is_file():
        found.setdefault(directory, []).append(path)
  return found, skipped


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name == "__MACOSX"


def _images(files: Mapping[Path, Sequence[Path]]) -> list[Path]:
  """All images, sorted."""
  suffixes = images.suffixes()
  return sorted(
    p for p in itertools.chain.from_iterable(files.values()) if p.suffix.lower() in suffixes
  )


def _scan(root: Path, split: str, follow_links: bool) -> _Found:
  files, skipped = _walk(root, follow_links)
  notes = []
  told, listed = _read_metadata(root, files, skipped)
  # Of folders alone: an image may be named `train.jpg` for what it shows.
  places = {directory: f"{directory.relative_to(root).as_posix()}/" for directory in files}
  chosen, said = splits.choose(list(places.values()), split, root, "folders")
  if said:
    notes.append(said)
    files = {d: of for d, of in files.items() if places[d] in set(chosen)}
  captions = {
    p.with_suffix(""): p
    for suffix in reversed(_CAPTIONS)
    for of in files.values()
    for p in of
    if p.suffix.lower() == suffix
  }
  everything = _images(files)
  pairs, odd, used = _find_pairs(root, everything, captions, told)
  in_pairs = {p for pair in pairs for p in (pair.winner, pair.loser)}
  entries = [_Entry(pair.winner, pair.caption) for pair in pairs]
  rest = [p for p in everything if p not in in_pairs]
  entries += [_Entry(p, told[p]) for p in rest if p in told]
  rest = [p for p in rest if p not in told]
  listed_stems = {p.with_suffix("") for p in told}
  free = {stem: p for stem, p in captions.items() if stem not in used | listed_stems}
  beside, alone = _captions_beside(root, rest, free)
  entries += beside
  by_caption = sum(isinstance(e.caption, Path) and e.caption.suffix != ".txt" for e in beside)
  notes += [f"{wording.count(n, 'caption')} from {name}" for name, n in sorted(listed.items())]
  if by_caption:
    notes.append(f"{wording.count(by_caption, 'caption')} from .caption files")
  if pairs:
    notes.append(f"{wording.count(len(pairs), 'pair')}, of which winners alone can be experts")
  return _Found(sorted(entries), sorted(pairs), skipped, alone, odd, notes)


def _captions_beside(
  root: Path, found: Sequence[Path], captions: Mapping[Path, Path]
) -> tuple[list[_Entry], list[tuple[str, BadRow]]]:
  """Images with the caption files beside them, and what was left over, with the reason."""
  entries: list[_Entry] = []
  skipped: list[tuple[str, BadRow]] = []
  by_folder: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
  for p in found:
    by_folder[p.parent][p.stem].append(p)
  texts: dict[Path, dict[str, Path]] = defaultdict(dict)
  for path, p in captions.items():
    texts[p.parent][path.name] = p
  for directory in sorted({*by_folder, *texts}):
    of, beside = by_folder[directory], texts[directory]
    shared = None if of.get("caption") else beside.pop("caption", None)
    if shared:
      of["caption"] = [p for stem in list(of) if stem not in beside for p in of.pop(stem)]
      beside["caption"] = shared
    for stem in sorted({*of, *beside}):
      there = of.get(stem, [])
      if stem in beside and len(there) == 1:
        entries.append(_Entry(there[0], beside[stem]))
      elif stem in beside:
        number = f"{len(there) or 'no'} image{'' if len(there) == 1 else 's'} beside it"
        skipped.append((beside[stem].relative_to(root).as_posix(), BadRow(number)))
      else:
        none = BadRow("no caption")
        skipped += [(p.relative_to(root).as_posix(), none) for p in there]
  return entries, skipped


def _find_pairs(
  root: Path,
  found: Sequence[Path],
  captions: Mapping[Path, Path],
  told: Mapping[Path, str],
) -> tuple[list[_Pair], list[tuple[str, BadRow]], set[Path]]:
  """Pairs by their names; images that lack another or a caption; stems of captions used."""
  sides: dict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
  for p in found:
    if side := _side_of(p, root):
      sides[side[0]][side[1]].append(p)
  pairs: list[_Pair] = []
  odd: list[tuple[str, BadRow]] = []
  used: set[Path] = set()
  for stem, (winners, losers) in sorted(sides.items()):
    name = (winners or losers)[0].relative_to(root).as_posix()
    if len(winners) != 1 or len(losers) != 1:
      sizes = wording.count(len(winners), "winner"), wording.count(len(losers), "loser")
      odd.append((name, BadRow(f"{sizes[0]} and {sizes[1]} of a name")))
      continue
    own = [told.get(p) or captions.get(p.with_suffix("")) for p in (winners[0], losers[0])]
    if all(own) and own[0] != own[1] and _text_or_none(own[0]) != _text_or_none(own[1]):
      continue  # two images that happen to have such names
    shared = [stem.parent / "caption", winners[0].parent / "caption"]
    known = [*own, captions.get(stem), *(captions.get(s) for s in shared)]
    caption = next((c for c in known if c), None)
    if caption is None:
      odd.append((name, BadRow("no caption")))
      continue
    pairs.append(_Pair(winners[0], losers[0], caption))
    used |= {stem, winners[0].with_suffix(""), losers[0].with_suffix("")}
    if isinstance(caption, Path):
      used.add(caption.with_suffix(""))
  return pairs, odd, used


def _side_of(image: Path, root: Path) -> tuple[Path, int] | None:
  """What names both images of a pair, and 0 for the winner, 1 for the loser."""
  if match := _SIDE.fullmatch(image.stem):
    return image.parent / (match[1] or ""), int(match[2].lower() in _LOSERS)
  side = image.parent.name.lower()
  if image.parent != root and side in (*_WINNERS, *_LOSERS):
    return image.parent.parent / image.stem, int(side in _LOSERS)
  return None


def _read_metadata(
  root: Path,
  files: Mapping[Path, Sequence[Path]],
  skipped: list[tuple[str, BadRow]],
) -> tuple[dict[Path, str], Counter[str]]:
  """Captions by image from metadata files, and how many from which; adds to `skipped`."""
  told: dict[Path, str] = {}
  listed: Counter[str] = Counter()
  there = set(_images(files))
  for directory, names in sorted(files.items()):
    for file in (p for p in names if p.name in _METADATA):
      where = file.relative_to(root).as_posix()
      for number, row in _rows_of(file):
        try:
          if isinstance(row, BadRow):
            raise row
          name, caption = _listed(row)
          image = Path(os.path.normpath(directory / name))
          if not image.is_relative_to(root):
            raise BadRow("file_name leads out of the folder")
          if image not in there:
            raise BadRow("no such image", name[:200])
          told[image] = caption
          listed[where] += 1
        except BadRow as error:
          skipped.append((f"{where} row {number}", error))
  return told, listed


def _listed(row: Mapping[str, Any]) -> tuple[str, str]:
  name = bad_rows.caption_of(row.get("file_name"), "file_name")
  column = next((c for c in _COLUMNS if c in row), None)
  if column is None:
    raise BadRow(f"none of the columns {', '.join(_COLUMNS)}")
  return name, _one_line(bad_rows.caption_of(row[column], column))


def _rows_of(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
  """The rows of a metadata file, from 1 on.

  Raises:
    UserError: the file is damaged.
  """
  if file.suffix == ".parquet":
    kinds = dict.fromkeys(("file_name", *_COLUMNS), "text")
    opened = parquet.open_file(file, kinds)
    names = [name for name in kinds if name in opened.schema_arrow.names]
    number = 0
    for group in range(opened.num_row_groups):
      columns = parquet.read_group(opened, file, group, names)
      for values in zip(*columns.values(), strict=True):
        number += 1
        yield number, dict(zip(columns, values, strict=True))
  elif file.suffix == ".csv":
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
      try:
        yield from enumerate(csv.DictReader(stream), 1)
      except csv.Error as error:
        raise UserError(f"{file} cannot be read as CSV: {first_line(error)}") from error
  else:
    with file.open("rb") as stream:
      for number, line in enumerate(stream, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
          row = None
        yield number, row if isinstance(row, dict) else BadRow("not a JSON object in UTF-8")


def _read_caption(caption: Path | str) -> str:
  """A caption as one line.

  Raises:
    BadRow: it is empty, not UTF-8, too long, or cannot be read.
  """
  if isinstance(caption, str):
    return _one_line(caption)
  with images.open_regular(caption, bad_rows.MAX_CAPTION) as stream:
    return _one_line(bad_rows.caption_of(stream.read()))


def _one_line(text: str) -> str:
  return " ".join(text.split())


def _text_or_none(caption: Path | str | None) -> str | None:
  try:
    return _read_caption(caption) if caption else None
  except BadRow:
    return None
