"""The exceptions that mean: not a defect of the program, and said in one line."""

import errno

# A disk, or a file system's server, that does not answer now.
_TRANSIENT = (
  *(errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN),
  *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.ENOTCONN),
)


class UserError(Exception):
  """Bad input, said in one line; `main` prints it and exits with status 2."""

  status = 2


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
  """What an error says first, or what it is called where it says nothing."""
  return str(error).strip().partition("\n")[0] or type(error).__name__


def storage_error(message: str, error: OSError) -> UserError:
  """What a failure to write is: for the user to mend, or one that may pass."""
  passes = error.errno in _TRANSIENT or isinstance(error, TimeoutError)
  return (TransientError if passes else UserError)(message)
