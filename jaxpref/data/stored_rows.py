"""The rows of a built data set: their columns, and the check that makes them."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxpref.data import bad_rows, images
from jaxpref.data.bad_rows import BadRow

_TEXT = tfds.features.Text
_OPTIONAL = {
  **dict.fromkeys(("score_0", "score_1"), np.float32),
  **dict.fromkeys(("image_0_uid", "image_1_uid"), _TEXT),
}


def columns_of(table: str, first: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the columns that a table's rows are stored with.

  Args:
    table: 'pairs', 'images', 'singles', 'lists' or 'captions'.
    first: the first row, which says what optional columns and how many images there are.
  """
  match table:
    case "pairs":
      more = tuple(name for name in _OPTIONAL if name in first)
      return ("caption", "jpg_0", "jpg_1", "label_0", "label_1", *more)
    case "lists":
      numbers = sorted(int(name[5:]) for name in first if name.startswith("rank_"))
      return ("prompt", *(f"{name}_{k}" for k in numbers for name in ("jpg", "rank")))
    case "singles":
      return ("caption", "jpg", "liked")
    case "images":
      return ("caption", "jpg")
  return ("caption",)


def features_of(columns: tuple[str, ...]) -> tfds.features.FeaturesDict:
  """Returns the features of rows with these columns; images also have a height and width."""
  features: dict[str, Any] = {}
  for name in columns:
    if name.startswith("jpg"):
      features[name] = tfds.features.Tensor(shape=(), dtype=np.object_)
      features[name.replace("jpg", "size")] = tfds.features.Tensor(shape=(2,), dtype=np.int32)
    elif name in ("caption", "prompt") or name.endswith("_uid"):
      features[name] = _TEXT()
    else:
      features[name] = np.bool_ if name == "liked" else np.float32
  return tfds.features.FeaturesDict(features)


def check(
  row: Mapping[str, Any],
  columns: tuple[str, ...],
  counts: Mapping[str, Counter[str]],
  *,
  least_side: int,
) -> tuple[dict[str, Any], bytes]:
  """Checks a row as training would, and returns what is stored of it.

  Args:
    row: of a source's table.
    columns: from `columns_of`.
    counts: counters of the report, which are increased: 'converted', 'sizes', 'words' and
      'labels'.
    least_side: images with a shorter side, in pixels, are refused.

  Returns:
    The stored row, and 16 bytes that tell its content from that of other rows.

  Raises:
    BadRow: the row cannot be used.
  """
  stored: dict[str, Any] = {}
  digest = hashlib.sha256()
  found: list[tuple[str, str]] = []  # counter and key, counted only if the whole row is good
  for name in columns:
    value = row[name]
    if name in ("caption", "prompt"):
      stored[name] = bad_rows.caption_of(value, name)
      found.append(("words", str(len(stored[name].split()))))
      digest.update(b"t" + stored[name].encode() + b"\0")
    elif name.startswith("jpg"):
      content, size, was = images.normalize(bytes_of(value, name))
      if min(size) < least_side:
        raise BadRow(f"an image with a side below {least_side} pixels", "{} x {}".format(*size))
      stored[name] = content
      stored[name.replace("jpg", "size")] = np.array(size, np.int32)
      found.append(("sizes", "{}x{}".format(*size[::-1])))
      if was:
        found.append(("converted", was))
      digest.update(b"i" + hashlib.sha256(content).digest())
    elif name.endswith("_uid"):
      stored[name] = (
        ""
        if value is None
        else value.decode(errors="replace")
        if isinstance(value, bytes)
        else str(value)
      )
    elif name == "liked":
      stored[name] = bool(value)
      digest.update(b"l" + bytes([stored[name]]))
    else:
      stored[name] = bad_rows.number_of(value, name)
      if name.startswith(("label", "rank")):
        digest.update(f"{name}={stored[name]}".encode())
  found += [("labels", label) for label in _labels(stored)]
  for counter, key in found:
    counts[counter][key] += 1
  return stored, digest.digest()[:16]


def bytes_of(value: Any, name: str) -> bytes:
  """Returns the content of an image file that is given as bytes or as a path.

  Args:
    value: of a row.
    name: of the column.

  Raises:
    BadRow: the value is null or of another type, or the file cannot be read.
  """
  if value is None:
    raise BadRow(f"{name} is null")
  if isinstance(value, Path):
    with images.open_regular(value) as stream:
      return stream.read()
  if not isinstance(value, bytes):
    raise BadRow("with an image that is neither bytes nor a path", f"a {type(value).__name__}")
  return value


def _labels(row: Mapping[str, Any]) -> list[str]:
  if "label_0" in row:
    first, second = row["label_0"], row["label_1"]
    return [
      "tie" if first == second else f"{'first' if first > second else 'second'} preferred"
    ]
  if "liked" in row:
    return ["liked" if row["liked"] else "disliked"]
  return []
