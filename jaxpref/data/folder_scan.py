"""Discovery of images, captions and pairs in a folder.

At any depth, the caption of `name.jpg` is in `name.txt` or `name.caption` beside it, in
`caption.txt` if it is the only image of its folder, or in a row of `metadata.jsonl`, `.csv` or
`.parquet` that has the image's `file_name`, relative to that file. A row comes before a file
beside the image, and several rows of an image give it several captions. A pair is `name_w.png`
and `name_l.png`, or two equal names in folders `w` and `l`, with one caption.
"""

import csv
import itertools
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.data import bad_rows, images, parquet, splits
from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import UserError, count, first_line

_CAPTIONS = (".txt", ".caption")  # the first takes precedence
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_COLUMNS = ("text", "caption", "prompt")  # of captions; the first that a row has
_WINNERS = (
  *("w", "win", "winner", "winners", "chosen", "preferred", "better", "good", "positive"),
)
_LOSERS = (
  *("l", "lose", "loser", "losers", "rejected", "dispreferred", "worse", "bad", "negative"),
)
# Images and listings that people have and that are not read.
_OTHER_IMAGES = (".heic", ".heif", ".jxl", ".cr2", ".nef", ".arw", ".dng", ".svg", ".raw")
_OTHER_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".zip")
_SIDE = re.compile(rf"(?:(.+)_)?({'|'.join((*_WINNERS, *_LOSERS))})", re.IGNORECASE)
_NO_CAPTION = "no caption"
csv.field_size_limit(1 << 28)  # longer captions than allowed are bad rows, not bad files
_LINK = BadRow("a link out of the folder", "copy it there, or set data.follow_links")


class Entry(NamedTuple):
  """An image with its caption, or with the file of its caption."""

  image: Path
  caption: Path | str


class Pair(NamedTuple):
  """Two images with one caption, or with the file of their caption."""

  winner: Path
  loser: Path
  caption: Path | str


class Found(NamedTuple):
  """The contents of a folder.

  Attributes:
    entries: images with captions, including the winners of pairs.
    pairs: pairs of images.
    skipped: files that can be neither an entry nor part of a pair: name and reason.
    unmatched: images without a caption and captions without an image: name and reason.
    lost: number of images that have no entry for these reasons. A caption that is bad or has
      another name may stand in both lists, under its own name and under its image's.
    incomplete: images of pairs without a partner or a caption: name and reason.
    notes: sources of captions and pairs other than `.txt` files, as sentences for the user.
  """

  entries: list[Entry]
  pairs: list[Pair]
  skipped: list[tuple[str, BadRow]]
  unmatched: list[tuple[str, BadRow]]
  lost: int
  incomplete: list[tuple[str, BadRow]]
  notes: list[str]


def walk(
  root: Path, follow_links: bool
) -> tuple[dict[Path, list[Path]], list[tuple[str, BadRow]]]:
  """Lists the files of a folder at any depth, without hidden ones.

  Links to something inside the folder are never followed: the scan finds their targets anyway.

  Args:
    root: the folder.
    follow_links: whether to follow links that lead out of the folder.

  Returns:
    The sorted paths of the image, caption and metadata files of each subfolder; and the names
    of what was skipped, with the reasons.
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
    if (real := os.path.realpath(place)) in seen:  # links can form a loop
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
      suffix = path.suffix.lower()
      if suffix in _OTHER_IMAGES and suffix not in used:
        skipped.append((relative(path), BadRow(f"{suffix} files are not read")))
      if suffix not in used and name not in _METADATA:
        continue
      if path.is_symlink() and not follow_links and leads_out(path):
        skipped.append((relative(path), _LINK))
      elif path.is_file():
        found.setdefault(directory, []).append(path)
  return found, skipped


def _is_hidden(name: str) -> bool:
  return name.startswith(".") or name == "__MACOSX"


def images_of(files: Mapping[Path, Sequence[Path]]) -> list[Path]:
  """Returns the paths of all images, sorted."""
  suffixes = images.suffixes()
  return sorted(
    p for p in itertools.chain.from_iterable(files.values()) if p.suffix.lower() in suffixes
  )


def scan(root: Path, split: str, follow_links: bool) -> Found:
  """Finds the images, captions and pairs of a folder.

  Args:
    root: the folder.
    split: the split to read if subfolders are named by split; see `splits.choose`.
    follow_links: whether to follow links that lead out of the folder.

  Raises:
    UserError: the split does not exist, or a metadata file is damaged.
  """
  files, skipped = walk(root, follow_links)
  notes = []
  links = len(skipped)
  listed, counts = _read_metadata(root, files, skipped)
  # Only folders name a split: a file may be called `train.jpg` because it shows a train.
  places = {directory: f"{directory.relative_to(root).as_posix()}/" for directory in files}
  chosen, said = splits.choose(list(places.values()), split, root, "folders")
  if said:
    notes.append(said)
    files = {d: of for d, of in files.items() if places[d] in set(chosen)}
  everything = images_of(files)
  names = set(everything)
  captions = {
    _without_suffixes(p, names): p
    for suffix in reversed(_CAPTIONS)
    for of in files.values()
    for p in of
    if p.suffix.lower() == suffix
  }
  first = {image: of[0] for image, of in listed.items()}
  pairs, incomplete, used = _find_pairs(root, everything, captions, first)
  in_pairs = {p for pair in pairs for p in (pair.winner, pair.loser)}
  entries = [Entry(pair.winner, pair.caption) for pair in pairs]
  losers = _losers_by_folder(everything, root)
  rest = [p for p in everything if p not in in_pairs and p not in losers]
  entries += [Entry(p, caption) for p in rest for caption in listed.get(p, ())]
  rest = [p for p in rest if p not in listed]
  taken = used | {p.with_suffix("") for p in (*listed, *losers)}
  free = {stem: p for stem, p in captions.items() if stem not in taken}
  beside, unmatched = _match_captions(root, rest, free)
  entries += beside
  without = sum(reason.reason == _NO_CAPTION for _, reason in unmatched)
  lost = links + max(without, len(unmatched) - without + len(skipped) - links)
  by_caption = sum(isinstance(e.caption, Path) and e.caption.suffix != ".txt" for e in beside)
  notes += [f"{count(n, 'caption')} from {name}" for name, n in sorted(counts.items())]
  if by_caption:
    notes.append(f"{count(by_caption, 'caption')} from .caption files")
  if pairs:
    notes.append(f"{count(len(pairs), 'pair')}; only their winners can be experts")
  if other := _other_files(root):
    notes.append(f"not read: {', '.join(other[:5])}{' and more' if len(other) > 5 else ''}")  # noqa: PLR2004
  return Found(sorted(entries), sorted(pairs), skipped, unmatched, lost, incomplete, notes)


def _without_suffixes(caption: Path, names: set[Path]) -> Path:
  """Returns the path of a caption's image without suffix, for name.txt and name.jpg.txt."""
  stem = caption.with_suffix("")
  return stem.with_suffix("") if stem in names else stem


def _losers_by_folder(found: Sequence[Path], root: Path) -> set[Path]:
  """Returns the images in folders for losers that lie beside folders for winners."""
  sides = {p.parent for p in found if p.parent != root}
  winners = {d.parent for d in sides if d.name.lower() in _WINNERS}
  losers = {d for d in sides if d.name.lower() in _LOSERS and d.parent in winners}
  return {p for p in found if p.parent in losers}


def _other_files(root: Path) -> list[str]:
  """Returns the names of listings and archives at the top of the folder that are not read."""
  names = sorted(p.name for p in root.iterdir() if p.suffix.lower() in _OTHER_FILES)
  return [name for name in names if name not in _METADATA and not _is_hidden(name)]


def _match_captions(
  root: Path, found: Sequence[Path], captions: Mapping[Path, Path]
) -> tuple[list[Entry], list[tuple[str, BadRow]]]:
  """Matches images with the caption files beside them.

  Args:
    root: the folder, for names.
    found: images without a caption.
    captions: caption files by their path without suffix.

  Returns:
    The matched images; and the images and captions without a match, with the reasons.
  """
  entries: list[Entry] = []
  skipped: list[tuple[str, BadRow]] = []
  by_folder: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
  # macOS writes accents as characters of their own: equal names may have different bytes.
  for p in found:
    by_folder[p.parent][unicodedata.normalize("NFC", p.stem)].append(p)
  texts: dict[Path, dict[str, Path]] = defaultdict(dict)
  for path, p in captions.items():
    texts[p.parent][unicodedata.normalize("NFC", path.name)] = p
  for directory in sorted({*by_folder, *texts}):
    of, beside = by_folder[directory], texts[directory]
    shared = None if of.get("caption") else beside.pop("caption", None)
    if shared:
      of["caption"] = [p for stem in list(of) if stem not in beside for p in of.pop(stem)]
      beside["caption"] = shared
    for stem in sorted({*of, *beside}):
      there = of.get(stem, [])
      if stem in beside and len(there) == 1:
        entries.append(Entry(there[0], beside[stem]))
      elif stem in beside:
        reason = "a caption for several images" if there else "a caption without an image"
        detail = ", ".join(p.name for p in there[:3])
        skipped.append((beside[stem].relative_to(root).as_posix(), BadRow(reason, detail)))
      else:
        skipped += [(p.relative_to(root).as_posix(), BadRow(_NO_CAPTION)) for p in there]
  return entries, skipped


def _find_pairs(
  root: Path,
  found: Sequence[Path],
  captions: Mapping[Path, Path],
  listed: Mapping[Path, str],
) -> tuple[list[Pair], list[tuple[str, BadRow]], set[Path]]:
  """Finds pairs by the names of their images.

  Args:
    root: the folder.
    found: all images.
    captions: caption files by their path without suffix.
    listed: captions from metadata files by image.

  Returns:
    The pairs; images without a partner or a caption, with the reasons; and the paths without
    suffix of the caption files that the pairs use.
  """
  sides: dict[Path, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
  for p in found:
    if side := _side_of(p, root):
      sides[side[0]][side[1]].append(p)
  pairs: list[Pair] = []
  incomplete: list[tuple[str, BadRow]] = []
  used: set[Path] = set()
  for stem, (winners, losers) in sorted(sides.items()):
    name = (winners or losers)[0].relative_to(root).as_posix()
    if len(winners) != 1 or len(losers) != 1:
      sizes = f"{count(len(winners), 'winner')}, {count(len(losers), 'loser')}"
      incomplete.append((name, BadRow("a name without one winner and one loser", sizes)))
      continue
    own = [listed.get(p) or captions.get(p.with_suffix("")) for p in (winners[0], losers[0])]
    if all(own) and own[0] != own[1] and _text_or_none(own[0]) != _text_or_none(own[1]):
      if winners[0].parent != losers[0].parent:
        incomplete.append((name, BadRow("a pair with two captions")))
      continue  # in one folder, the images only happen to have such names
    shared = [stem.parent / "caption", winners[0].parent / "caption"]
    known = [*own, captions.get(stem), *(captions.get(s) for s in shared)]
    caption = next((c for c in known if c), None)
    if caption is None:
      incomplete.append((name, BadRow(_NO_CAPTION)))
      continue
    pairs.append(Pair(winners[0], losers[0], caption))
    used |= {stem, winners[0].with_suffix(""), losers[0].with_suffix("")}
    if isinstance(caption, Path):
      used.add(caption.with_suffix(""))
  return pairs, incomplete, used


def _side_of(image: Path, root: Path) -> tuple[Path, int] | None:
  """Returns the path that a pair's images share, and 0 for the winner, 1 for the loser."""
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
) -> tuple[dict[Path, list[str]], Counter[str]]:
  """Reads captions from metadata files.

  Args:
    root: the folder.
    files: its files by subfolder.
    skipped: gets the rows that cannot be used, with the reasons.

  Returns:
    Captions by image, and the number of captions by metadata file.
  """
  listed: dict[Path, list[str]] = {}
  counts: Counter[str] = Counter()
  there = set(images_of(files))
  for directory, names in sorted(files.items()):
    for file in (p for p in names if p.name in _METADATA):
      where = file.relative_to(root).as_posix()
      for number, row in _rows_of(file):
        try:
          if isinstance(row, BadRow):
            raise row
          name, caption = _name_and_caption(row)
          image = Path(os.path.normpath(directory / name))
          if image not in there and "\\" in name:  # a path as Windows writes it
            image = Path(os.path.normpath(directory / name.replace("\\", "/")))
          if not image.is_relative_to(root):
            raise BadRow("file_name leads out of the folder")
          if image not in there:
            raise BadRow("no such image", name[:200])
          if caption not in (of := listed.setdefault(image, [])):
            of.append(caption)
            counts[where] += 1
        except BadRow as error:
          skipped.append((f"{where} row {number}", error))
  return listed, counts


def _name_and_caption(row: Mapping[str, Any]) -> tuple[str, str]:
  columns = ", ".join(str(c) for c in row)
  if None in row:  # as the package csv reads it
    raise BadRow("more fields than the header has")
  if "file_name" not in row:
    raise BadRow("no column file_name", f"columns: {columns}")
  name = bad_rows.caption_of(row["file_name"], "file_name")
  there = [c for c in _COLUMNS if c in row]
  if not there:
    raise BadRow(f"none of the columns {', '.join(_COLUMNS)}", f"columns: {columns}")
  column = next((c for c in there if row[c] is not None), there[0])
  return name, _one_line(bad_rows.caption_of(row[column], column))


def _rows_of(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
  """Yields the rows of a metadata file with their numbers, from 1.

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
        # Strict: an open quote would make all the rest one caption.
        yield from enumerate(csv.DictReader(stream, strict=True), 1)
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


def read_caption(caption: Path | str) -> str:
  """Returns a caption as one line; reads it if it is in a file.

  Raises:
    BadRow: the caption is empty, not UTF-8, too long, or cannot be read.
  """
  if isinstance(caption, str):
    return _one_line(caption)
  with images.open_regular(caption, bad_rows.MAX_CAPTION) as stream:
    return _one_line(bad_rows.caption_of(stream.read()))


def _one_line(text: str) -> str:
  return " ".join(text.split())


def _text_or_none(caption: Path | str | None) -> str | None:
  try:
    return read_caption(caption) if caption else None
  except BadRow:
    return None
