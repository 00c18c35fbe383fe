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
    raise UserError(f"{text}: the user has no home directory") from error
