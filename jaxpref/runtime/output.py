"""Standard output and error on which printing cannot fail."""

import codecs
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


class _Output:
  """A text stream that ignores errors; after one, it discards everything.

  A run should not fail because the reader of its output is gone (`| head`) or because the
  terminal's encoding lacks a character.
  """

  def __init__(self, stream: TextIO):
    stream.reconfigure(errors=_spell_out.__name__)  # type: ignore[attr-defined]
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes `text`, unless the stream has failed."""
    return self._attempt(lambda: self._stream.write(text)) or 0

  def flush(self) -> None:
    """Flushes the buffer, unless the stream has failed."""
    self._attempt(self._stream.flush)

  def _attempt(self, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except OSError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)
      return None

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _spell_out(error: UnicodeError) -> tuple[str, int]:
  """Replaces characters that the encoding lacks, for example a plus-minus sign by `+-`."""
  if not isinstance(error, UnicodeEncodeError):
    raise error
  missing = error.object[error.start : error.end]
  return "".join(
    _SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing
  ), error.end


_SPELLED = {"±": "+-", "→": "->", "×": "x", "–": "-", "…": "..."}


def secure_output() -> None:
  """Replaces stdout and stderr by streams on which printing cannot fail."""
  codecs.register_error(_spell_out.__name__, _spell_out)
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
      os.fstat(number)
    except OSError:  # closed by the parent; the next opened file would get this number
      os.open(os.devnull, os.O_RDWR)
    if name != "stdin":
      stream = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8", closefd=False)
      setattr(sys, name, _Output(stream))
