"""Ways to damage files for the fuzzer: bytes, JSON, lines, columns and command lines.

Each way takes a random generator and a file's content, and returns other content.
"""

import functools
import io
import json
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies

SIZE = 8  # pixels of images, which `fuzz_inputs` makes

# Damage to bytes.


def flip(rng: random.Random, data: bytes) -> bytes:
  """Flips one to four bits."""
  out = bytearray(data or b"\0")
  for _ in range(rng.choice((1, 1, 1, 4))):
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
  return bytes(out)


def flip_early(rng: random.Random, data: bytes) -> bytes:
  """Changes a byte of the first hundred, where headers are."""
  out = bytearray(data or b"\0")
  out[rng.randrange(min(100, len(out)))] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
  return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
  """Cuts the end off."""
  return data[: rng.randrange(len(data) + 1)]


def repeat(rng: random.Random, data: bytes) -> bytes:
  """Repeats a part of the data."""
  i, j = sorted(rng.randrange(len(data) + 1) for _ in "ij")
  return data[:j] + data[i:j] * rng.choice((1, 1, 2)) + data[j:]


def splice(rng: random.Random, data: bytes) -> bytes:
  """Overwrites a part with another part."""
  if len(data) < 2:
    return data * 2
  size = rng.randrange(1, len(data))
  i, j = (rng.randrange(len(data) - size + 1) for _ in "ij")
  return data[:j] + data[i : i + size] + data[j + size :]


def insert(rng: random.Random, data: bytes) -> bytes:
  """Inserts a few bytes that are difficult for parsers."""
  i = rng.randrange(len(data) + 1)
  odd = (b"\0", b"\xff\xfe", b"\x1b[2J", "\u202e".encode(), b"\n\n", b"{" * 3000, b"9" * 5000)
  return data[:i] + rng.choice(odd) + data[i:]


BYTES = (flip, flip, flip_early, cut, repeat, splice, insert)

# Damage to values in JSON.


@functools.cache
def _json_values() -> tuple[Any, ...]:
  """Returns JSON values of any shape, the same each time."""
  found: list[Any] = []
  leaves = (
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text()
  )
  trees = strategies.recursive(
    leaves,
    lambda inner: (
      strategies.lists(inner, max_size=4)
      | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=4)
    ),
  )

  @hypothesis.seed(0)
  @hypothesis.settings(
    max_examples=300,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(trees)
  def collect(value):
    found.append(value)

  collect()
  return tuple(found)


_ABSURD: tuple[Any, ...] = (
  *(0, 1, -1, 3, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e-30, 1e308, float("nan")),
  *(float("inf"), "", "\0", "\x1b[31m", "a" * 5000, "../..", "/dev/zero", True, None, [], {}),
  *([[]], [1, [2]], ["x"], [1e9] * 3, [None], {"a": {"b": 1}}, [0] * 2000),
)


def edit_json(rng: random.Random, data: bytes) -> bytes:
  """Replaces, removes, renames or wraps a value anywhere in a JSON tree."""
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):  # damaged already
    return flip(rng, data)
  places: list[tuple[Any, Any]] = []

  def visit(node: Any) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      places.append((node, key))
      if isinstance(value, dict | list):
        visit(value)

  root = [tree]
  visit(root)
  # Most values of a large file are similar, so its upper levels are as likely as all the rest.
  upper = places[: max(1, min(30, len(places)))]
  node, key = rng.choice(rng.choice((places, upper)))
  match rng.choice(("absurd", "absurd", "any", "remove", "wrap", "rename", "swap", "deep")):
    case "absurd":
      node[key] = rng.choice(_ABSURD)
    case "any":
      node[key] = rng.choice(_json_values())
    case "remove":
      if node is not root:
        del node[key]
    case "wrap":
      node[key] = rng.choice(([node[key]], {"x": node[key]}, str(node[key])))
    case "rename":
      if isinstance(node, dict):
        node[rng.choice((str(key) + "_", "", str(key).upper(), "x" * 3000))] = node.pop(key)
    case "swap":
      other, place = rng.choice(places)
      node[key] = json.loads(json.dumps(other[place]))
    case "deep":
      node[key] = "DEEP"
      deep = "[" * 100_000 + "]" * 100_000
      return json.dumps(root[0]).replace('"DEEP"', deep).encode()
  return json.dumps(root[0]).encode() if root else b""


def edit_line(rng: random.Random, data: bytes) -> bytes:
  """Edits, repeats, removes or moves a line."""
  lines = data.splitlines(keepends=True) or [b""]
  i = rng.randrange(len(lines))
  match rng.choice(("edit", "edit", "edit", "repeat", "remove", "move", "join")):
    case "edit":
      ways = (edit_json, flip, insert, cut)
      lines[i] = rng.choice(ways)(rng, lines[i].rstrip(b"\n")) + b"\n"
    case "repeat":
      lines.insert(i, lines[i])
    case "remove":
      del lines[i]
    case "move":
      lines.insert(rng.randrange(len(lines)), lines.pop(i))
    case "join":
      lines[i] = lines[i].rstrip(b"\n")
  return b"".join(lines)


JSON = (*(edit_json,) * 5, flip, cut, insert)
LINES = (*(edit_line,) * 5, flip, cut, insert)

# Damage to columns of parquet.


def _columns(n: int) -> tuple[Callable[[], pa.Array], ...]:
  """Returns makers of columns with n rows, of every kind of type."""
  odd = [b"\xff\xfe", b"", None, b"\x1b[2J"]
  return (
    lambda: pa.nulls(n),
    lambda: pa.array([None] * n, pa.string()),
    lambda: pa.array(["x"] * n),
    lambda: pa.array(["x" * 200_000] * n),
    lambda: pa.array(["1"] * n, pa.string_view()),
    lambda: pa.array([odd[i % 4] for i in range(n)], pa.binary()),
    lambda: pa.array([b"12"] * n, pa.binary(2)),
    lambda: pa.array(range(n), pa.int8()),
    lambda: pa.array([2**64 - 1] * n, pa.uint64()),
    lambda: pa.array([float("nan")] * n),
    lambda: pa.array([float("inf"), -1e308] * n)[:n],
    lambda: pa.array(np.zeros(n, np.float16)),
    lambda: pa.array([True] * n),
    lambda: pa.array([[1, 2]] * n),
    lambda: pa.array([[b"a"]] * n),
    lambda: pa.array([{"bytes": b"a", "path": "../../etc/passwd"}] * n),
    lambda: pa.array([{"bytes": None, "path": "x.png"}] * n),
    lambda: pa.array([{"bytes": None, "path": None}, None] * n)[:n],
    lambda: pa.array([{"a": 1}] * n),
    lambda: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    lambda: pa.array([0] * n, pa.timestamp("ns")),
    lambda: pa.array([0] * n, pa.date32()),
    lambda: pa.array([0] * n, pa.duration("s")),
    lambda: pa.array(["a"] * n).dictionary_encode(),
    lambda: pa.array([None] * n, pa.decimal128(20, 3)),
  )


def edit_column(rng: random.Random, data: bytes) -> bytes:
  """Replaces a column, sets a value to null, or removes, renames or repeats a column."""
  table = pq.read_table(io.BytesIO(data))
  i, n = rng.randrange(table.num_columns), table.num_rows
  name = table.column_names[i]
  match rng.choice(("type", "type", "type", "null", "remove", "rename", "twice", "none")):
    case "type":
      table = table.set_column(i, name, rng.choice(_columns(n))())
    case "null":
      values = table.column(i).to_pylist()
      values[rng.randrange(n)] = None
      table = table.set_column(i, name, pa.array(values, table.schema.field(i).type))
    case "remove":
      table = table.remove_column(i)
    case "rename":
      names = list(table.column_names)
      names[i] = rng.choice((name.upper(), "", "\x1b[31m", names[0], "x" * 3000))
      table = table.rename_columns(names)
    case "twice":
      table = table.append_column(name, table.column(i))
    case "none":
      table = table.slice(0, 0)
  return to_parquet(table)


def to_parquet(table: pa.Table) -> bytes:
  """Writes a table as parquet whose pages have checksums."""
  stream = io.BytesIO()
  pq.write_table(table, stream, write_page_checksum=True, compression="none")
  return stream.getvalue()


def flip_in_page(rng: random.Random, data: bytes) -> bytes:
  """Flips a bit of an image in a page with a checksum."""
  start = rng.choice([i for i in range(len(data)) if data.startswith(b"BM", i)])
  out = bytearray(data)
  out[start + rng.randrange(SIZE * SIZE * 3)] ^= 1 << rng.randrange(8)
  return bytes(out)


# Damage to command lines, which are JSON lists of arguments.

_WORDS = (
  *("", "0", "-1", "1e308", "nan", "inf", "9" * 400, "9" * 5000, "[]", "()", "(1,2)", "None"),
  *("true", "\x1b[31m", "\u202e", "é" * 300, "..", "~nobody", "{}", "/dev/null", "--help"),
  *("a" * 5000, "(" * 300, "-" * 9000 + "1", "['a'," * 50, "=", "--", "\ud800", "1_000"),
  *("0x10", "--config", "--config.", "--config.x.y=1", "--config.train=3", "-h", "--seed"),
)


def edit_arguments(rng: random.Random, data: bytes) -> bytes:
  """Changes a value, or removes, repeats, moves, splits or joins arguments."""
  arguments = json.loads(data)
  i = rng.randrange(len(arguments))
  name, equals, value = arguments[i].partition("=")
  match rng.choice(("value", "value", "value", "word", "remove", "name", "split", "edit")):
    case "value":
      arguments[i] = f"{name}={rng.choice(_WORDS)}"
    case "word":
      arguments.insert(i, rng.choice(_WORDS))
    case "remove":
      del arguments[i]
    case "name":
      changed = flip(rng, name.encode())
      arguments[i] = f"{changed.decode(errors='surrogateescape')}{equals}{value}"
    case "split":
      arguments[i : i + 1] = [name, value]
    case "edit":
      changed = rng.choice(BYTES)(rng, arguments[i].encode("utf-8", "replace"))
      arguments[i] = changed.decode(errors="surrogateescape")
  return json.dumps(arguments).encode()
