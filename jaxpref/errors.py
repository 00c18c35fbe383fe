"""Errors that are not a defect of the program, and how they are shown: in one line."""

import errno
from collections.abc import Sequence

# A disk, or a file system's server, that does not answer now.
_TRANSIENT = (
  *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN),
  *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ENOTCONN),
)


_LONGEST = 700  # characters of an error: two long paths, and what to do
_LONGEST_REASON = 200  # characters of what a library said


def one_line(value: object, *, longest: int = _LONGEST) -> str:
  """Returns a text as one printable line of bounded length.

  File names and what libraries say may hold line ends, terminal sequences or characters that
  reorder a line: those are escaped as Python writes them. A long text loses its middle.

  Args:
    value: a text, or what `str` makes one of, such as an exception.
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
  """Bad input; `main` prints it and exits with status 2.

  As a text it is one line of bounded length, whatever it quotes.
  """

  status = 2

  def __str__(self) -> str:
    """The message, as `one_line` shows it."""
    return one_line(super().__str__())


class DamagedError(UserError):
  """A file whose contents are not what was written into it."""


class DivergedError(UserError):
  """A run whose numbers are no longer finite; the exit status is 3."""

  status = 3


class TransientError(UserError):
  """What may be well at the next start, which launchers then make; the exit status is 75."""

  status = 75


class StoppedError(UserError):
  """A run that was asked to stop and can go on; the exit status is that of SIGTERM."""

  status = 143


def first_line(error: BaseException) -> str:
  """Returns what an error says first, cut if it is long, or its name if it says nothing."""
  line = str(error).strip().partition("\n")[0] or type(error).__name__
  return one_line(line, longest=_LONGEST_REASON)


def storage_error(message: str, error: OSError) -> UserError:
  """What a failure to write is: for the user to mend, or one that may pass."""
  passes = error.errno in _TRANSIENT or isinstance(error, TimeoutError)
  return (TransientError if passes else UserError)(message)


def listed(names: Sequence[str], limit: int = 3) -> str:
  """Joins names with commas: the first few, and how many more there are."""
  rest = len(names) - limit
  return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
