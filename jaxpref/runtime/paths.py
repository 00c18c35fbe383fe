"""Helpers for paths that users write."""

import os
import re
from pathlib import Path

from jaxpref.errors import UserError


def user_path(text: str | os.PathLike) -> Path:
  """Returns a path with `~` expanded.

  Raises:
    UserError: the user or the home directory does not exist, or no file can have this name.
  """
  try:
    path = Path(text).expanduser()
    if b"\0" in os.fsencode(path):
      raise UserError(f"{os.fspath(text)!r} is not a path")
    return path
  except UnicodeEncodeError as error:
    raise UserError(f"{os.fspath(text)!r} is not a path") from error
  except RuntimeError as error:
    own = os.fspath(text).partition("/")[0] == "~"
    reason = "the home directory is not known" if own else "this user has no home directory"
    raise UserError(f"{text}: {reason}") from error


def number_of(name: str) -> int | None:
  """Parses the number that a directory is named after, such as a checkpoint's step.

  Returns:
    None for all other names, including other ways to write a number ('007', '+5', '5 (copy)',
    digits of other scripts).
  """
  return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None
