"""Selection of the files of one split by their names."""

import re
from collections.abc import Sequence
from pathlib import Path

from jaxpref.errors import UserError

_BASE = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
  **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NAMES = "|".join(_BASE)
# As a word anywhere in a file's name: my-train.parquet, test-00000-of-00001.parquet.
_NAME = re.compile(rf"(?:^|[-_. ])({_NAMES})(_unique)?(?=$|[-_. ])")
# Only as a folder's whole name, since a folder may show trains: train, split=train.
_FOLDER = re.compile(rf"(?:split=|partial-)?({_NAMES})(_unique)?")
# File names of `datasets` and tensorflow_datasets have the split before the shard's number.
_SHARD = re.compile(rf"(?:^|[-. ])({_NAMES})(_\w+)?-\d+-of-\d+(?=$|[-. ])")
ALL = "all"


def choose(
  names: Sequence[str], split: str, root: Path, noun: str = "files"
) -> tuple[list[str], str]:
  """Chooses the files of a split by their names.

  Files without a split in their name count as 'train', unless other files are named so. If no
  file is of 'train', all are read.

  Args:
    names: paths of the files, relative to `root`.
    split: 'train', 'validation' (or 'val', ...), 'test', 'test_unique', ...; 'all' takes every
      file.
    root: the folder, for error messages.
    noun: 'files' or 'folders', for messages.

  Returns:
    The chosen names, and a note on what was chosen; '' if all were, as asked.

  Raises:
    UserError: the split does not exist.
  """
  wanted = _BASE.get(split.lower(), split.lower())
  of = [split_of(name) for name in names]
  known = sorted({s for s in of if s})
  if wanted == ALL or not known:
    if wanted not in (ALL, "train"):
      raise UserError(f"{root} has no split {split!r}; data.split must be one of train, {ALL}")
    return list(names), ""
  accepted = ("",) if wanted == "train" and wanted not in known else ()
  if wanted == "train" and known == ["train"]:
    accepted = ("",)
  chosen = [name for name, s in zip(names, of, strict=True) if s in (wanted, *accepted)]
  if not chosen and wanted == "train":
    return list(names), f"all {noun} are of {', '.join(known)}, none is of data.split=train"
  if not chosen:
    choices = ", ".join((*known, ALL))
    raise UserError(f"{root} has no split {split!r}; data.split must be one of {choices}")
  if len(chosen) == len(names):
    return chosen, ""
  others = ", ".join(s for s in known if s != wanted) or "those without a split in their name"
  number = f"{len(chosen)} of {len(names)} {noun}"
  return chosen, f"{number}, those of data.split={wanted} (not {others})"


def split_of(name: str) -> str:
  """Returns the split in a file's name, else in the nearest folder's name, else ''."""
  *folders, file = name.lower().split("/")
  stem = re.sub(r"\.[a-z]+$", "", file)
  by_folder = (_FOLDER.fullmatch(part) for part in reversed(folders))
  found = (_SHARD.search(stem), _NAME.search(stem), *by_folder)
  said = next((match for match in found if match), None)
  return _BASE[said[1]] + (said[2] or "") if said else ""
