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
_NAME = re.compile(rf"({'|'.join(_BASE)})(_unique)?(?=$|[-_. ])")
_FOLDER = re.compile(rf"({'|'.join(_BASE)})(_unique)?")
# File names of `datasets` and tensorflow_datasets; the split may be anywhere in these names.
_SHARD = re.compile(rf"(?:^|[-. ])({'|'.join(_BASE)})(_\w+)?-\d+-of-\d+(?=$|[-. ])")
ALL = "all"


def choose(
  names: Sequence[str], split: str, root: Path, noun: str = "files"
) -> tuple[list[str], str]:
  """Chooses the files of a split if the names have several splits.

  Args:
    names: paths of the files, relative to `root`.
    split: 'train', 'validation', 'test', 'test_unique', ...; 'all' takes every file.
    root: the folder, for error messages.
    noun: 'files' or 'folders', for messages.

  Returns:
    The chosen names, and a note on what was chosen. If the names have fewer than two splits,
    all names and ''.

  Raises:
    UserError: the split does not exist.
  """
  found = [split_of(name) for name in names]
  known = sorted({s for s in found if s})
  if split == ALL or (len(known) < 2 and split in ("train", *known)):
    return list(names), ""
  chosen = [name for name, s in zip(names, found, strict=True) if s == split]
  if not chosen:
    choices = ", ".join((*known, ALL))
    raise UserError(f"{root} has no split {split!r}; data.split must be one of {choices}")
  others = ", ".join(s for s in known if s != split)
  number = f"{len(chosen)} of {len(names)} {noun}"
  return chosen, f"{number}, those of data.split={split} (not {others})"


def split_of(name: str) -> str:
  """Returns the split in a file's name, else in the nearest folder's name, else ''."""
  *folders, file = name.lower().split("/")
  stem = re.sub(r"\.[a-z]+$", "", file)
  by_folder = (_FOLDER.fullmatch(part) for part in reversed(folders))
  found = (_SHARD.search(stem), _NAME.match(stem), *by_folder)
  said = next((match for match in found if match), None)
  return _BASE[said[1]] + (said[2] or "") if said else ""
