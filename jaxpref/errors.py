"""The exceptions that mean: not a defect of the program, and said in one line."""

import errno

# What the machine refuses however often it is asked: permission, space, such a name.
REFUSALS = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
  *(errno.ENAMETOOLONG, errno.ENOTDIR),
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


def storage_error(message: str, error: OSError) -> UserError:
  """What a failure to write is: refused, or a file system that has lost its server, say."""
  return (UserError if error.errno in REFUSALS else TransientError)(message)
