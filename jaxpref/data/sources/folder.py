"""A folder of the user's images with captions, read as experts or as pairs.

`folder_scan` finds images, captions and pairs. Files that cannot be used are counted and named
in one warning, and the others are used. Nothing outside the folder is read unless
`data.follow_links` is set.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref.data import folder_scan, splits, top_k
from jaxpref.data.bad_rows import Tally
from jaxpref.data.top_k import Example
from jaxpref.errors import UserError
from jaxpref.runtime.paths import user_path

SORTED = True


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
    image_size: height and width in pixels; every image is cropped and resized to it, see
      `images.fit`.
    limit: the number of images to read; 0 reads all.
    seed: selects images at random if there are more than `limit`; None reads the first ones.
    caption: one caption for all images, which then need no caption files; None reads the
      caption of each image.
    split: the split to read if subfolders are named by split; see `splits.choose`.
    follow_links: whether to follow links that lead out of the folder.
    option: the option that named the folder, for error messages.
    hint: appended to the error message if no image has a caption.
    tally: counts the files that cannot be used; by default a warning lists them.

  Returns:
    Examples, sorted by path. An example's `source` is its path relative to the folder.

  Raises:
    UserError: the folder does not exist, or too few of its files can be used.
  """
  root = _root(path, option)
  warns, tally = tally is None, tally or Tally()
  if caption is None:
    table = _captioned(root, split, follow_links, tally)
  else:
    files, skipped = folder_scan.walk(root, follow_links)
    entries = [folder_scan.Entry(p, caption) for p in folder_scan.images_of(files)]
    table = FolderImages(root, entries, len(skipped))
    for name, reason in skipped:
      tally.leave_out(name, reason)
  examples = top_k.take_examples(table, limit, image_size=image_size, seed=seed, tally=tally)
  if warns:
    tally.warn(str(root), "file")
  if not examples:
    raise UserError(
      f"no image in {root} can be used"
      if caption is not None
      else f"no image with a caption in {root}: put name.txt or name.caption beside name.jpg, "
      "caption.txt beside the one image of a folder, or add metadata.jsonl"
      f"{'; see the warning' if tally.left_out else ''}{hint}"
    )
  return examples


def _captioned(root: Path, split: str, follow_links: bool, tally: Tally) -> "FolderImages":
  """Finds the images with captions of a folder, and counts what is skipped."""
  found = folder_scan.scan(root, split, follow_links)
  tally.read += found.notes
  for name, reason in (*found.skipped, *found.unmatched):
    tally.leave_out(name, reason)
  return FolderImages(root, found.entries, found.lost)


def count_images(path: str | os.PathLike) -> int:
  """Counts the images in a folder, including those that cannot be read."""
  return len(folder_scan.images_of(folder_scan.walk(user_path(path), follow_links=False)[0]))


class FolderImages(Sequence[Mapping[str, Any]]):
  """The images of a folder that have captions; images are paths.

  Attributes:
    lost: number of the folder's images that are not in the table.
  """

  def __init__(self, root: Path, entries: Sequence[folder_scan.Entry], lost: int):
    self._root, self._entries, self.lost = root, entries, lost

  def __len__(self) -> int:
    """Returns the number of images."""
    return len(self._entries)

  def __getitem__(self, index):
    """Returns image `index`; reads its caption.

    Raises:
      BadRow: the caption cannot be used.
    """
    entry = self._entries[index]
    return {"caption": folder_scan.read_caption(entry.caption), "jpg": entry.image}

  def where(self, index: int) -> str:
    """Returns the image's path, relative to the folder."""
    return self._entries[index].image.relative_to(self._root).as_posix()


class FolderPairs(Sequence[Mapping[str, Any]]):
  """The pairs of a folder, with Pick-a-Pic's columns; images are paths, image 0 the winner."""

  def __init__(self, root: Path, pairs: Sequence[folder_scan.Pair]):
    self._root, self._pairs = root, pairs

  def __len__(self) -> int:
    """Returns the number of pairs."""
    return len(self._pairs)

  def __getitem__(self, index):
    """Returns pair `index`; reads its caption.

    Raises:
      BadRow: the caption cannot be used.
    """
    pair = self._pairs[index]
    return {
      "caption": folder_scan.read_caption(pair.caption),
      "jpg_0": pair.winner,
      "jpg_1": pair.loser,
      "label_0": 1.0,
      "label_1": 0.0,
    }

  def where(self, index: int) -> str:
    """Returns the winner's path, relative to the folder."""
    return self._pairs[index].winner.relative_to(self._root).as_posix()


def open_images(data: ConfigDict, tally: Tally, kind: str = "experts") -> FolderImages:
  """Opens the images of the folder `data.path` that have captions, sorted by path.

  Raises:
    UserError: the folder does not exist, or no image has a caption.
  """
  del kind
  root = _root(data.path, "data.path")
  return _captioned(root, data.split, data.follow_links, tally)


def open_captions(data: ConfigDict, tally: Tally, kind: str = "captions") -> FolderImages:
  """Opens the captions of the folder's images, which are not read."""
  return open_images(data, tally, kind)


def open_pairs(data: ConfigDict, tally: Tally, kind: str = "pairs") -> FolderPairs:
  """Opens the pairs of the folder `data.path`.

  Raises:
    UserError: the folder does not exist, or has no or too few pairs that can be used.
  """
  del kind
  root = _root(data.path, "data.path")
  found = folder_scan.scan(root, data.split, data.follow_links)
  tally.read += found.notes
  left_out = (*found.skipped, *found.incomplete)
  for name, reason in left_out:
    tally.leave_out(name, reason)
  if not found.pairs:
    raise UserError(
      f"no pairs in {root}: name the images name_w.png and name_l.png, or give them equal "
      "names in folders w and l, with a caption in name.txt; the words winner and loser, or "
      "chosen and rejected, work instead of w and l"
    )
  tally.check(len(left_out), len(left_out) + len(found.pairs))
  return FolderPairs(root, found.pairs)


def _root(path: str | os.PathLike, option: str) -> Path:
  root = user_path(path)
  if not os.fspath(path) or not root.is_dir():
    raise UserError(f"{option} {os.fspath(path)!r} is not a folder")
  return root
