"""The journal of a build: which chunks are finished, and the content of all their rows."""

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.errors import UserError, first_line

_SCHEMA = """
create table if not exists plan (text text);
create table if not exists chunks (number integer primary key, rows integer, facts text);
create table if not exists contents (digest blob primary key) without rowid;
"""


_NAMED = 50  # bad rows whose texts are kept


class Chunk(NamedTuple):
  """The result of one chunk of rows.

  Attributes:
    rows: number of rows stored.
    counts: counts by counter and key.
    named: the first bad rows, as texts.
    digests: of the content of each stored row.
  """

  rows: int
  counts: dict[str, Counter[str]]
  named: list[str]
  digests: list[bytes]


class Journal:
  """An SQLite file, so that memory does not grow with the data set."""

  def __init__(self, file: Path, plan: dict[str, Any]):
    """Opens or makes the file.

    Args:
      file: its path.
      plan: of the build, as JSON values.

    Raises:
      UserError: the file is damaged, or of another plan.
    """
    try:
      self._db = sqlite3.connect(file, isolation_level=None)
      self._db.execute("pragma synchronous = full")
      self._db.executescript(_SCHEMA)
      there = self._db.execute("select text from plan").fetchone()
    except sqlite3.DatabaseError as error:
      raise UserError(
        f"{file} is damaged: {first_line(error)}; delete it, and the build begins again"
      ) from error
    text = json.dumps(plan, sort_keys=True)
    if there is None:
      self._db.execute("insert into plan values (?)", (text,))
    elif there[0] != text:
      before = json.loads(there[0])
      differ = ", ".join(sorted(k for k in plan if plan[k] != before.get(k)))
      raise UserError(
        f"{file.parent} holds a build with another {differ}: choose another --out"
      )

  def close(self) -> None:
    """Closes the file."""
    self._db.close()

  def finished(self) -> set[int]:
    """Returns the numbers of the finished chunks."""
    return {number for (number,) in self._db.execute("select number from chunks")}

  def repeated(self, digests: Sequence[bytes]) -> set[int]:
    """Returns the places of the rows whose content an earlier row has."""
    seen: set[bytes] = set()
    places = set()
    for place, digest in enumerate(digests):
      query = "select 1 from contents where digest = ?"
      if digest in seen or self._db.execute(query, (digest,)).fetchone():
        places.add(place)
      seen.add(digest)
    return places

  def add(self, number: int, chunk: Chunk) -> None:
    """Records a finished chunk, whose shard is written, in one transaction."""
    facts = json.dumps({"counts": chunk.counts, "named": chunk.named})
    self._db.execute("begin immediate")
    self._db.executemany("insert into contents values (?)", ((d,) for d in chunk.digests))
    self._db.execute("insert into chunks values (?, ?, ?)", (number, chunk.rows, facts))
    self._db.execute("commit")

  def lengths(self) -> list[int]:
    """Returns the number of rows of each finished chunk, in order."""
    query = "select rows from chunks order by number"
    return [rows for (rows,) in self._db.execute(query)]

  def totals(self) -> tuple[dict[str, Counter[str]], list[str]]:
    """Returns the sums of all counts, and the bad rows that are named."""
    counts: dict[str, Counter[str]] = {}
    named: list[str] = []
    for (text,) in self._db.execute("select facts from chunks order by number"):
      facts = json.loads(text)
      for counter, of in facts["counts"].items():
        counts.setdefault(counter, Counter()).update(of)
      named += facts["named"][: _NAMED - len(named)]
    return counts, named
