"""Files with a prompt a line."""

from pathlib import Path

from jaxpref.errors import UserError

_MAX_BYTES = 256 << 20  # half a million prompts of 500 bytes


def read_file(path: Path, *, shown: str) -> list[str]:
  """Reads the prompts of a file in UTF-8, one a line, without empty lines.

  Args:
    path: the file.
    shown: what it is called in errors.

  Raises:
    UserError: it is missing, not a regular file, too large, unreadable or empty.
  """
  try:
    if path.exists() and not path.is_file():
      raise UserError(f"cannot read {shown}: it is not a regular file")
    if path.is_file() and (size := path.stat().st_size) > _MAX_BYTES:
      most = f"at most {_MAX_BYTES >> 20} MB are read"
      raise UserError(f"cannot read {shown}: it has {size >> 20} MB, {most}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
  except (OSError, ValueError) as error:  # a ValueError: not UTF-8, or a name with a null
    raise UserError(f"cannot read {shown}: {error}") from error
  if not (prompts := [line for line in lines if line]):
    raise UserError(f"{shown} holds no prompt")
  return prompts
