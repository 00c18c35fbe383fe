"""What the package's programs have in common: flags, messages, exit status."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxpref.errors import TransientError, UserError, one_line
from jaxpref.runtime import jax_setup, output

# What the machine refuses: no permission, no space, no such name.
_REFUSALS = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
  *(errno.ENAMETOOLONG, errno.ENOTDIR),
)

_LONGEST_MESSAGE = 2000  # characters of a warning


class Parser(argparse.ArgumentParser):
  """Flags of a program without a configuration file; what is wrong is one line."""

  def __init__(self, doc: str):
    super().__init__(description=doc, allow_abbrev=False)

  def error(self, message: str):
    """Raises what argparse would print with a page of usage."""
    raise UserError(f"{message}; --help lists the flags")

  def parse_args(self, args=None, namespace=None):
    """Parses; an option whose value is `--` has none, which argparse makes an empty list."""
    found = super().parse_args(args, namespace)
    for action in self._actions:
      if action.nargs is None and getattr(found, action.dest, None) == []:
        self.error(f"argument {action.option_strings[0]}: expected one argument")
    return found

  def add_run_flags(self) -> None:
    """--ema and --step, which weights of a run are meant."""
    self.add_argument(
      "--ema",
      action=argparse.BooleanOptionalAction,
      default=True,
      help="of a run, the averaged weights, which its report compares; --no-ema: the last",
    )
    self.add_argument(
      "--step",
      type=_step,
      help="of a run, which checkpoint: a number of updates, or 'best' of those that were "
      "evaluated; the newest good one by default",
    )


def _step(text: str) -> int | str:
  if text != "best" and not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be a number of updates or 'best', got {text!r}")
  return text if text == "best" else int(text)


class _OneLine(logging.Formatter):
  """Messages as one line each; tracebacks that a library logs follow as they are."""

  def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
    return f"jaxpref: {one_line(record.message, longest=_LONGEST_MESSAGE)}"


FLAGS = {"workdir": "directory of the run; runs/<name>-<preset> by default"}


def run(main: Callable[[list[str]], int]) -> NoReturn:
  """A program's process, from its arguments to its exit status."""
  output.secure_output()
  try:
    sys.exit(main(sys.argv[1:]))
  except BaseException as error:
    if "jax" in sys.modules:  # else there are no other processes, and no need to wait for it
      from jaxpref.runtime import distributed  # noqa: PLC0415

      distributed.end_alone(error)
    if isinstance(error, SystemExit) and error.code == TransientError.status:
      # Else threads that wait for a storage that does not answer hold up the end.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(TransientError.status)
    raise
  finally:
    sys.stdout.flush()
    sys.stderr.flush()


def exit_status(
  job: Callable[[list[str]], None], argv: list[str], *, continues: bool = True
) -> int:
  """Runs a program's job: 0, 2 after a one-line error, 130 if interrupted.

  Other errors have statuses of their own, see `jaxpref.errors`.

  Args:
    job: takes the arguments.
    argv: without the program's name.
    continues: whether the same command goes on where an interrupted one stopped.
  """
  log = logging.StreamHandler()
  log.setFormatter(_OneLine())
  logging.basicConfig(level=logging.WARNING, handlers=[log], force=True)
  jax_setup.use_all_cores()
  try:
    job(argv)
  except UserError as error:
    print(f"jaxpref: error: {error}", file=sys.stderr)
    return error.status
  except OSError as error:
    if error.errno not in _REFUSALS:
      raise
    print(f"jaxpref: error: {one_line(error)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    rest = "the same command resumes this run" if continues else "nothing was written"
    print(f"jaxpref: interrupted; {rest}", file=sys.stderr)
    return 130
  return 0
