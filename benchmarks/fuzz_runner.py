"""Tests a reader with damaged input: damages a valid file, runs the reader, judges the outcome.

A target is a reader with a valid input, a few small files. An input of the fuzzer is the valid
one with one or two damaged files. It depends only on seed, target and number.
"""

import contextlib
import dataclasses
import fnmatch
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_inputs as inputs
import pyarrow as pa
from fuzz_damage import edit_arguments
from fuzz_inputs import DIRECTORY, PIPE, Files

from jaxpref.data.bad_rows import BadRow
from jaxpref.errors import UserError, one_line
from jaxpref.runtime import cli

LONGEST = 750  # maximum characters of a refusal, without the program's name
SECONDS = 8.0  # time limit per input


@dataclasses.dataclass(frozen=True)
class Target:
  """A reader with a valid input.

  Attributes:
    name: for the table.
    make: writes the valid input; takes an empty directory and a pipeline's directory.
    read: reads a directory and returns a value to compare; raises `UserError`, or `BadRow` for
      a single row.
    damage: ways to damage a file's content; each input uses one of them.
    files: patterns of the names of files to damage.
    exact: whether checksums ensure that the reader returns what was written.
    weight: relative number of inputs.
  """

  name: str
  make: Callable[[Path, Path], None]
  read: Callable[[Path], Any]
  damage: tuple[Callable[[random.Random, bytes], bytes], ...]
  files: tuple[str, ...] = ("*",)
  exact: bool = False
  weight: int = 4


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of an input: 'equal', 'other', 'refused', 'traceback', 'hang' or 'silent'.

  `text` is the refusal's line, or the error's type and place. 'silent' means that a damaged
  file was read as something else although it has checksums.
  """

  kind: str
  text: str = ""


class _Late(BaseException):
  """Raised in a reader that takes too long; no `except Exception` stops it."""


class Prepared:
  """A target's valid input, and what is read of it."""

  def __init__(self, target: Target, scratch: Path, tiny: Path):
    """Makes and reads it.

    Args:
      target: of which.
      scratch: a directory for inputs.
      tiny: a small pipeline's directory.
    """
    self.target, self._scratch = target, scratch
    directory = scratch / "valid"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    target.make(directory, tiny)
    self.files = inputs.read_all(directory)
    self.original = target.read(directory)

  def damaged(self, seed: int, number: int) -> Files:
    """The files of an input."""
    rng = random.Random(f"{seed}/{self.target.name}/{number}")
    files = dict(self.files)
    names = [name for name in files if any(fnmatch.fnmatch(name, p) for p in self.target.files)]
    program = self.target.damage == (edit_arguments,)
    for _ in range(rng.choice((1, 1, 2))):
      name = rng.choice(names)
      special = 0 if self.target.exact or program else rng.random()
      if special > 0.96:
        files[name] = rng.choice((PIPE, DIRECTORY))
      elif special > 0.92:
        files[name] = files[rng.choice(list(self.files))]
      elif isinstance(files[name], bytes):
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # damaged already
          files[name] = rng.choice(self.target.damage)(rng, files[name])
    return files

  def run(self, seed: int, number: int) -> Outcome:
    """Reads an input within its time."""
    directory = self._scratch / "input"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    inputs.write(directory, self.damaged(seed, number))

    def late(*_):
      raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
      found = self.target.read(directory)
    except _Late:
      return Outcome("hang")
    except BaseException as error:
      signal.setitimer(signal.ITIMER_REAL, 0)
      return _failure(error)
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
      signal.signal(signal.SIGALRM, before)
    if found == self.original:
      return Outcome("equal")
    return Outcome("silent" if self.target.exact else "other")


def _failure(error: BaseException) -> Outcome:
  refused = isinstance(error, UserError | BadRow)
  if isinstance(error, OSError) and error.errno in cli._REFUSALS:
    refused = True
  if isinstance(error, KeyboardInterrupt):
    raise error
  try:
    if refused:
      line = str(error) if isinstance(error, UserError) else one_line(error)
      if not isinstance(error, BadRow):  # whose text goes into a warning of one line
        check_line(line)
      return Outcome("refused", line)
  except AssertionError as odd:
    error = odd
  frame = error.__traceback__
  where = ""
  while frame is not None:
    file = frame.tb_frame.f_code.co_filename
    if "jaxpref" in file and "benchmarks" not in file:
      where = f" at {Path(file).name}:{frame.tb_lineno}"
    frame = frame.tb_next
  return Outcome("traceback", f"{type(error).__name__}{where}: {str(error)[:200]!r}")


def check_line(line: str) -> None:
  """A refusal is one printable line of bounded length."""
  if not line.isprintable() or not 0 < len(line) <= LONGEST:
    raise AssertionError(f"a refusal of {len(line)} characters: {line[:200]!r}")
