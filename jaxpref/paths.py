"""Paths as users write them."""

import os
import re
from pathlib import Path

from jaxpref.errors import UserError


def user_path(text: str | os.PathLike) -> Path:
  """The path, `~` expanded.

  Raises:
    UserError: there is no such user, or no home directory, or no file can have this name.
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
    reason = "there is no home directory" if own else "no such user's home"
    raise UserError(f"{text}: {reason}") from error


def number_of(name: str) -> int | None:
  """The number that a directory is named after, such as a checkpoint's step.

  Returns:
    None for every other way to write a number ('007', '+5', '5 (copy)', other scripts'
    digits) and for all other names.
  """
  return int(name) if re.fullmatch("0|[1-9][0-9]{0,17}", name) else None
