"""Rows that cannot be learned from: left out, counted by reason, the first of them named."""

import decimal
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxpref.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CAPTION = 100_000  # bytes; CLIP's tokenizer cuts far below
_NAMED = 50  # bad rows that the warning names


class BadRow(Exception):
  """Why a row cannot be used: a reason, by which it is counted, and what is particular."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason


class Tally:
  """Counts what became of the rows that were looked at.

  Attributes:
    left_out: number of bad rows by reason.
    ties: pairs without a preference, which are not bad rows.
    read: what was read, in words, such as the layout of a folder; a note each.
  """

  def __init__(self, max_share: float = 1.0, option: str = "data.max_bad_share"):
    """Begins with nothing.

    Args:
      max_share: of the rows looked at that may be bad.
      option: that set it, for messages.
    """
    self.left_out: Counter[str] = Counter()
    self.ties = 0
    self.read: list[str] = []
    self._named: list[str] = []
    self._max_share, self._option = max_share, option

  def leave_out(self, where: str, error: BadRow) -> None:
    """Counts a bad row."""
    self.left_out[error.reason] += 1
    if len(self._named) < _NAMED:
      self._named.append(f"{where} ({error})")

  def check(self, bad: int, looked_at: int) -> None:
    """Refuses data of which too many rows are bad.

    Raises:
      UserError: the share of `bad` ones is more than is allowed.
    """
    if bad > self._max_share * looked_at:
      raise UserError(
        f"{bad} of {looked_at} rows of the data cannot be used ({self.reasons()}), first "
        f"{self._named[0]}: more than {self._option} = {self._max_share:g} allows"
      )

  def reasons(self) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())

  def warn(self, source: str, noun: str = "row") -> None:
    """Names what was left out in one warning, if there was anything.

    Args:
      source: that was read.
      noun: of what was left out.
    """
    if not (total := self.left_out.total()):
      return
    more = f" and {total - len(self._named)} more" if total > len(self._named) else ""
    named = ", ".join(self._named) + more
    by_reason = f" ({self.reasons()})" if len(self.left_out) > 1 else ""
    nouns = noun if total == 1 else f"{noun}s"
    _log.warning("%s: %d %s cannot be used%s: %s", source, total, nouns, by_reason, named)

  def words(self) -> dict[str, str]:
    """What a report says of it, by name."""
    return {
      "rows left out": self.reasons() or "none",
      **({"ties left out": str(self.ties)} if self.ties else {}),
      **({"data read": "; ".join(self.read)} if self.read else {}),
    }

  def facts(self) -> dict[str, Any]:
    """Returns the same as JSON takes it."""
    return {"left_out": dict(self.left_out), "ties": self.ties, "read": self.read}


def take(
  indices: Sequence[int],
  read: Callable[[int], T | None],
  tally: Tally,
  *,
  where: Callable[[int], str],
  limit: int = 0,
  place: Callable[[int], Any] = int,
) -> list[T]:
  """Reads rows until there are enough good ones: a bad row is replaced by the next.

  Args:
    indices: of the rows, in the order in which they are to be taken.
    read: of an index; raises `BadRow`, or returns None for a row that is passed over.
    tally: of the bad ones.
    where: a row is, for people.
    limit: rows wanted, 0 for all.
    place: by which rows are read at once, and sorted in the end; files are read in order.

  Returns:
    What `read` returned for the first `limit` good rows, sorted by `place`.

  Raises:
    UserError: too many rows are bad.
  """
  found: dict[int, T] = {}
  start = bad = 0
  while start < len(indices) and (not limit or len(found) < limit):
    chunk = indices[start : start + limit - len(found)] if limit else indices
    for i in sorted(chunk, key=place):
      try:
        value = read(i)
      except BadRow as error:
        tally.leave_out(where(i), error)
        bad += 1
        continue
      if value is not None:
        found[i] = value
    start += len(chunk)
    tally.check(bad, start)
  return [found[i] for i in sorted(found, key=place)]


def sample(count: int, limit: int, seed: int | None) -> Sequence[int]:
  """An order in which to take rows: at random where not all are wanted.

  Args:
    count: rows there are.
    limit: rows wanted, 0 for all.
    seed: of the order; None keeps that of the data.
  """
  if seed is None or not limit or limit >= count:
    return range(count)
  # The same on every machine: of integers alone.
  return np.random.default_rng([seed, 0x524F5753]).permutation(count).tolist()


def named_by(source: Sequence[Any]) -> Callable[[int], str]:
  """How a source names its rows: file and row where it knows them, else their numbers."""
  return getattr(source, "where", lambda i: f"row {i}")


def caption_of(value: Any, column: str = "caption") -> str:
  """A caption, of text or UTF-8.

  Raises:
    BadRow: it is null, empty, no text, or longer than MAX_CAPTION.
  """
  if value is None:
    raise BadRow(f"{column} is null")
  if not isinstance(value, bytes | str):
    raise BadRow(f"{column} is not text")
  try:
    raw = value if isinstance(value, bytes) else value.encode()
    if len(raw) > MAX_CAPTION:
      raise BadRow(f"{column} of more than {MAX_CAPTION} bytes", f"{len(raw)} bytes")
    text = raw.decode("utf-8-sig")
  except UnicodeError as error:
    raise BadRow(f"{column} is not UTF-8") from error
  if not text.strip():
    raise BadRow(f"empty {column}")
  return text


def number_of(value: Any, column: str) -> float:
  """A number, of any numeric type.

  Raises:
    BadRow: it is null, not finite or no number.
  """
  if value is None:
    raise BadRow(f"{column} is null")
  if not isinstance(value, int | float | decimal.Decimal | np.number | np.bool_):
    raise BadRow(f"{column} is not a number")
  try:
    number = float(value)
  except (OverflowError, ValueError):
    number = math.inf
  if not math.isfinite(number):
    raise BadRow(f"{column} is not finite")
  return number
