"""Paths as users write them."""

import os
from pathlib import Path

from jaxpref.errors import UserError


def user_path(text: str | os.PathLike) -> Path:
  """The path, `~` expanded.

  Raises:
    UserError: there is no such user, or no home directory.
  """
  try:
    return Path(text).expanduser()
  except RuntimeError as error:
    own = os.fspath(text).partition("/")[0] == "~"
    reason = "there is no home directory" if own else "no such user's home"
    raise UserError(f"{text}: {reason}") from error
