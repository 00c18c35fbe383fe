"""Handling of rows that cannot be used: skip, count by reason, name the first ones."""

import decimal
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxpref.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_CAPTION = 100_000  # bytes; CLIP's tokenizer cuts captions much earlier
_NAMED = 50  # bad rows that the warning lists


class BadRow(Exception):
  """The reason why a row cannot be used, by which it is counted, and a detail."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason = reason


class Tally:
  """A count of the rows that were read and left out.

  Attributes:
    left_out: number of bad rows by reason.
    ties: pairs without a preference, which are not bad rows.
    read: notes on what was read, such as the layout of a folder.
  """

  def __init__(self, max_share: float = 1.0, option: str = "data.max_bad_share"):
    """Starts an empty tally.

    Args:
      max_share: largest share of the rows read that may be bad.
      option: name of the option that sets it, for error messages.
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

  def add(self, left_out: Mapping[str, int], named: Sequence[str]) -> None:
    """Adds counts by reason, and texts that name bad rows."""
    self.left_out.update(left_out)
    self._named += named[: _NAMED - len(self._named)]

  def check(self, bad: int, looked_at: int) -> None:
    """Refuses data with too many bad rows.

    Raises:
      UserError: the share of `bad` rows is larger than allowed.
    """
    if bad > self._max_share * looked_at:
      raise UserError(
        f"{bad} of {looked_at} rows of the data cannot be used ({self.reasons()}), first "
        f"{self._named[0]}: more than {self._option} = {self._max_share:g} allows"
      )

  def reasons(self) -> str:
    """Returns each reason with its count, the most frequent first."""
    return ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())

  def warn(self, source: str, noun: str = "row") -> None:
    """Logs one warning with the rows that were left out, if there are any.

    Args:
      source: name of the data.
      noun: 'row', 'file' or another word for one item.
    """
    if not (total := self.left_out.total()):
      return
    more = f" and {total - len(self._named)} more" if total > len(self._named) else ""
    named = ", ".join(self._named) + more
    by_reason = f" ({self.reasons()})" if len(self.left_out) > 1 else ""
    nouns = noun if total == 1 else f"{noun}s"
    _log.warning("%s: %d %s cannot be used%s: %s", source, total, nouns, by_reason, named)

  def words(self) -> dict[str, str]:
    """Returns the tally as labels and texts for the report."""
    return {
      "rows left out": self.reasons() or "none",
      **({"ties left out": str(self.ties)} if self.ties else {}),
      **({"data read": "; ".join(self.read)} if self.read else {}),
    }

  def facts(self) -> dict[str, Any]:
    """Returns the tally as plain JSON values."""
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
  """Reads rows until there are enough good ones; the next row replaces a bad one.

  Args:
    indices: indices of the rows, in order of preference.
    read: reads the row of an index; raises `BadRow`, or returns None to skip the row.
    tally: counts the bad rows.
    where: names the row of an index, for messages.
    limit: number of good rows to read; 0 reads all.
    place: sort key of an index; rows are read and returned in this order, so that files are
      read sequentially.

  Returns:
    The results of `read` for the first `limit` good rows, sorted by `place`.

  Raises:
    UserError: too many rows are bad, or a row lacks a column.
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
      except KeyError as error:
        raise UserError(f"{where(i)} of the data lacks the column {error}") from error
      if value is not None:
        found[i] = value
    start += len(chunk)
    tally.check(bad, start)
  return [found[i] for i in sorted(found, key=place)]


def sample(count: int, limit: int, seed: int | None) -> Sequence[int]:
  """Returns the order in which to read rows: a random one if `limit` is below `count`.

  Args:
    count: number of rows.
    limit: number of rows to read; 0 means all.
    seed: seed of the random order; None keeps the order of the data.
  """
  if seed is None or not limit or limit >= count:
    return range(count)
  # A permutation of integers is the same on every machine.
  return np.random.default_rng([seed, 0x524F5753]).permutation(count).tolist()


def named_by(source: Sequence[Any]) -> Callable[[int], str]:
  """Returns the source's own function that names a row, or one that gives its number."""
  return getattr(source, "where", lambda i: f"row {i}")


def caption_of(value: Any, column: str = "caption") -> str:
  """Returns a caption as text; decodes bytes as UTF-8.

  Raises:
    BadRow: it is null, empty, not text, or longer than MAX_CAPTION.
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
  """Returns a number of any numeric type as a float.

  Raises:
    BadRow: it is null, not a number, or not finite.
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
