"""Files of prompts."""

from pathlib import Path

from jaxpref.errors import UserError

_LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")  # no prompt ends like this
_MAX_BYTES = 256 << 20  # half a million prompts of 500 bytes


def path_in(text: str) -> Path | None:
  """Returns the path that a text names, which may be missing, or None if it is a prompt."""
  try:
    path = Path(text).expanduser()
    # A single word may well be a prompt, also where a folder of that name is.
    is_path = path.is_file() or (len(path.parts) > 1 and path.exists())
  except (OSError, RuntimeError, ValueError):  # not a possible file name, or an unknown home
    return None
  return path if is_path or path.suffix.lower() in _LISTS else None


def read_file(path: Path, *, shown: str) -> list[str]:
  """Reads the prompts of a UTF-8 text file, one per line, without empty lines.

  Args:
    path: the file.
    shown: the file's name in error messages.

  Raises:
    UserError: see `read_utf8`, or the file is empty.
  """
  lines = [line.strip() for line in read_utf8(path, shown=shown).split("\n")]
  if not (prompts := [line for line in lines if line]):
    raise UserError(f"{shown} holds no prompt")
  return prompts


def read_utf8(path: Path, *, shown: str) -> str:
  """Reads a UTF-8 text file.

  Args:
    path: the file.
    shown: the file's name in error messages.

  Raises:
    UserError: the file is missing, not a regular file, too large or unreadable.
  """
  try:
    if path.exists() and not path.is_file():
      raise UserError(f"cannot read {shown}: it is not a regular file")
    if path.is_file() and (size := path.stat().st_size) > _MAX_BYTES:
      most = f"at most {_MAX_BYTES >> 20} MB are read"
      raise UserError(f"cannot read {shown}: it has {size >> 20} MB, {most}")
    return path.read_text(encoding="utf-8-sig")
  except (OSError, ValueError) as error:  # a ValueError: not UTF-8, or a name with a null
    raise UserError(f"cannot read {shown}: {error}") from error
