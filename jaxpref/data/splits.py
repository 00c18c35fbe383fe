"""Splits side by side in one folder: which files belong to which, by their names."""

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
# As `datasets` and tensorflow_datasets name their files; of these the whole name is meant.
_SHARD = re.compile(rf"(?:^|[-. ])({'|'.join(_BASE)})(_\w+)?-\d+-of-\d+(?=$|[-. ])")
ALL = "all"


def choose(
  names: Sequence[str], split: str, root: Path, noun: str = "files"
) -> tuple[list[str], str]:
  """The files of a split, where names have several.

  Args:
    names: of files, relative to `root`.
    split: 'train', 'validation', 'test', 'test_unique', ...; 'all' takes every file.
    root: the folder, for messages.
    noun: of what is named.

  Returns:
    Names, and in words what was taken and what was not; all and '' where names have fewer
    than two splits, so that there is nothing to choose from.

  Raises:
    UserError: there is no such split.
  """
  found = [split_of(name) for name in names]
  known = sorted({s for s in found if s})
  if split == ALL or (len(known) < 2 and split in ("train", *known)):
    return list(names), ""
  chosen = [name for name, s in zip(names, found, strict=True) if s == split]
  if not chosen:
    choices = ", ".join((*known, ALL))
    raise UserError(f"{root} has no split {split!r}; data.split is one of {choices}")
  others = ", ".join(s for s in known if s != split)
  number = f"{len(chosen)} of {len(names)} {noun}"
  return chosen, f"{number}, those of data.split={split} (not {others})"


def split_of(name: str) -> str:
  """The split that a file's name says, or that of the nearest folder which says one, or ''."""
  *folders, file = name.lower().split("/")
  stem = re.sub(r"\.[a-z]+$", "", file)
  by_folder = (_FOLDER.fullmatch(part) for part in reversed(folders))
  found = (_SHARD.search(stem), _NAME.match(stem), *by_folder)
  said = next((match for match in found if match), None)
  return _BASE[said[1]] + (said[2] or "") if said else ""
