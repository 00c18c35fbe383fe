"""Flags, messages and exit statuses that all of the package's programs share."""

import argparse
import errno
import gc
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from jaxpref.errors import TransientError, UserError, one_line
from jaxpref.runtime import jax_setup, output

# Errors that the user can fix: no permission, no space, an impossible name.
_REFUSALS = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
  *(errno.ENAMETOOLONG, errno.ENOTDIR),
)

_LONGEST_MESSAGE = 2000  # characters of a warning


class Parser(argparse.ArgumentParser):
  """A parser for programs without a configuration file; its errors are one line."""

  def __init__(self, doc: str):
    # By default argparse shows the file's name, which is __main__.py for a package.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    prog = f"python -m {module}" if module.startswith("jaxpref.") else None
    super().__init__(prog, description=doc, allow_abbrev=False)

  def error(self, message: str):
    """Raises the message as a `UserError`; argparse would print a page of usage and exit."""
    raise UserError(f"{message}; --help lists the flags")

  def parse_args(self, args=None, namespace=None):
    """Parses the arguments and refuses an option without a value.

    For `--option --`, argparse would return an empty list as the option's value.
    """
    found = super().parse_args(args, namespace)
    for action in self._actions:
      if action.nargs is None and getattr(found, action.dest, None) == []:
        self.error(f"argument {action.option_strings[0]}: expected one argument")
    return found

  def add_run_flags(self) -> None:
    """Adds --ema and --step, which select the weights of a run."""
    self.add_argument(
      "--ema",
      action=argparse.BooleanOptionalAction,
      default=True,
      help="for a run: use the EMA weights, which its report compares (the default); "
      "--no-ema: the weights after the last update",
    )
    self.add_argument(
      "--step",
      type=_step,
      help="for a run: the checkpoint, as a number of updates, or 'best' for the best of "
      "those evaluated; default: the newest good checkpoint",
    )


def at_least_1(text: str) -> int:
  """Parses a number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
  return int(text)


def share(text: str) -> tuple[int, int]:
  """Parses 'I/N', the share I of N, counted from 0."""
  match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
  if match is None or not int(match[1]) < int(match[2]):
    raise argparse.ArgumentTypeError(
      f"must be I/N with I from 0 to N-1, such as 0/4, got {text!r}"
    )
  return int(match[1]), int(match[2])


def size(text: str) -> tuple[int, int]:
  """Parses 'WIDTHxHEIGHT' or one number for both; returns height and width."""
  match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
  if match is None:
    raise argparse.ArgumentTypeError(f"must be like 512 or 512x768 (got {text})")
  return int(match[2] or match[1]), int(match[1])


def _step(text: str) -> int | str:
  if text != "best" and not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be a number of updates or 'best', got {text!r}")
  return text if text == "best" else int(text)


class _OneLine(logging.Formatter):
  """A formatter that makes each message one line and leaves logged tracebacks unchanged."""

  def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
    return f"jaxpref: {one_line(record.message, longest=_LONGEST_MESSAGE)}"


FLAGS = {"workdir": "directory of the run; default: runs/<name>-<preset>"}


def run(main: Callable[[list[str]], int]) -> NoReturn:
  """Runs a program's `main` on the command line's arguments and exits with its status."""
  output.secure_output()
  # Tracing makes many long-lived objects, which frequent collections would visit each time.
  gc.set_threshold(50_000, 20, 20)
  try:
    sys.exit(main(sys.argv[1:]))
  except BaseException as error:
    if "jax" in sys.modules:  # otherwise there is only this process, and importing jax is slow
      from jaxpref.runtime import distributed  # noqa: PLC0415

      distributed.end_alone(error)
    if isinstance(error, SystemExit) and error.code == TransientError.status:
      # A normal exit would wait for threads that are blocked on an unreachable storage.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(TransientError.status)
    raise
  finally:
    sys.stdout.flush()
    sys.stderr.flush()


def exit_status(
  job: Callable[[list[str]], None], argv: list[str], *, resumable: bool = True
) -> int:
  """Runs a program's job, prints a `UserError` as one line, and returns the exit status.

  Args:
    job: the program, called with `argv`.
    argv: the arguments, without the program's name.
    resumable: whether the same command resumes an interrupted one; for the message.

  Returns:
    0, 130 if interrupted, 2 if the machine refuses a file, or the `status` of the error (see
    `jaxpref.errors`).
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
    rest = "the same command resumes it" if resumable else "nothing was written"
    print(f"jaxpref: interrupted; {rest}", file=sys.stderr)
    return 130
  return 0
