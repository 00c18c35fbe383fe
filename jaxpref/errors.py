"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """Bad input, said in one line; `main` prints it and exits with status 2."""

  status = 2


class DivergedError(UserError):
  """A run whose numbers are no longer finite; the exit status is 3."""

  status = 3


class StoppedError(UserError):
  """A run that was asked to stop and can go on; the exit status is that of SIGTERM."""

  status = 143
