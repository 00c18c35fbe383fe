"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """Bad input, said in one line; `main` prints it and exits with status 2."""
