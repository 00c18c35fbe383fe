"""Exceptions with an exit status, and helpers for one-line messages."""

import errno
import traceback
from collections.abc import Sequence
from pathlib import Path

# Errors of a disk or file server that may work again later.
_TRANSIENT = (
  *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN),
  *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ENOTCONN),
)


_LONGEST = 700  # characters of an error: room for two long paths and the advice
_LONGEST_REASON = 200  # characters of another library's message


def one_line(value: object, *, longest: int = _LONGEST) -> str:
  """Returns a text as one printable line of bounded length.

  File names and other libraries' messages may hold line ends, terminal sequences or characters
  that reorder a line: those are escaped as in Python's `repr`. A long text loses its middle.

  Args:
    value: a text, or an object that `str` converts, such as an exception.
    longest: in characters; a text that is cut may be a few longer.
  """
  text = str(value).strip()
  line = _escape(text[:longest])
  if len(text) <= longest and len(line) <= longest:
    return line
  tail = longest // 3
  end = _escape(text[-tail:])[-tail:]
  return f"{line[: longest - tail]} ... ({len(text):,} characters) ... {end}"


def _escape(text: str) -> str:
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
  """Bad input; the entry points print it and exit with status 2.

  Its text is one line of bounded length, whatever the message quotes.
  """

  status = 2

  def __str__(self) -> str:
    """Returns the message in the form of `one_line`."""
    return one_line(super().__str__())


class DamagedError(UserError):
  """A file that does not hold what was written to it."""


class DivergedError(UserError):
  """Non-finite numbers in a run; exit status 3."""

  status = 3


class HackedError(UserError):
  """A run whose reward rises while another scorer falls; it is saved. Exit status 4."""

  status = 4


class TransientError(UserError):
  """A failure that a restart may fix; exit status 75 asks launchers to retry."""

  status = 75


class StoppedError(UserError):
  """A run that stopped on request and can be resumed; the exit status of SIGTERM, 143."""

  status = 143


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its class name if it has none."""
  line = str(error).strip().partition("\n")[0] or type(error).__name__
  return one_line(line, longest=_LONGEST_REASON)


def failure_of(error: BaseException, file: str | Path | None) -> str:
  """Describes an exception of a user's program as 'FILE, line N: TYPE: message'.

  Args:
    error: the exception.
    file: the user's file, of which the last line in the traceback is named. None: the last
      line of the traceback, whatever its file.
  """
  frames = traceback.extract_tb(error.__traceback__)
  places = [(frame.filename, frame.lineno) for frame in frames]
  if isinstance(error, SyntaxError) and error.filename:
    places.append((error.filename, error.lineno))
  if file is None and places:
    file = places[-1][0]
  lines = [
    line for name, line in places if file and Path(name).absolute() == Path(file).absolute()
  ]
  where = f"{file}, line {lines[-1]}: " if lines else f"{file}: " if file else ""
  name = type(error).__name__
  said = error.msg if isinstance(error, SyntaxError) else error
  reason = one_line(str(said).strip().partition("\n")[0], longest=_LONGEST_REASON)
  return where + (f"{name}: {reason}" if reason else name)


def storage_error(message: str, error: OSError) -> UserError:
  """Returns the error for a failed write: transient if a retry may succeed, else the user's."""
  passes = error.errno in _TRANSIENT or isinstance(error, TimeoutError)
  return (TransientError if passes else UserError)(message)


def listed(names: Sequence[str], limit: int = 3) -> str:
  """Joins names with commas: the first `limit` of them, and how many more there are."""
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def count(number: int, noun: str) -> str:
  """Returns a number with its noun: '1 image', '2 images', '1,200 images'."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"
