"""A data source of random rows: repeated images and captions, ties, equal scores and ranks."""

import io

import numpy as np
from PIL import Image


def _file(k):
  pixels = np.random.default_rng(k).integers(0, 256, (20, 16, 3), np.uint8)
  Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
  return file.getvalue()


SORTED = True
FILES = [_file(k) for k in range(12)]


def _rng(i):
  return np.random.default_rng([1, i])


def _pair(i):
  rng = _rng(i)
  a, b = (int(k) for k in rng.choice(12, 2, replace=False))
  win = float(rng.choice([0, 0.5, 1]))
  scores = rng.integers(0, 4, 2) / 4
  return {
    "caption": f"caption {rng.integers(5)}\\n",
    "jpg_0": FILES[a],
    "jpg_1": FILES[b],
    "label_0": win,
    "label_1": 1 - win,
    "score_0": float(scores[0]),
    "score_1": float(scores[1]),
    "image_0_uid": f"u{a:02d}",
    "image_1_uid": f"u{b:02d}",
  }


def open_pairs(data, tally, kind):
  rows, seen = [], set()
  for i in range(60):
    row = _pair(i)
    key = (row["caption"], row["jpg_0"], row["jpg_1"], row["label_0"])
    if key not in seen:  # builds leave out repeated rows
      rows.append(row)
    seen.add(key)
  return rows


def open_lists(data, tally, kind):
  def row(i):
    rng = _rng(i)
    ranks = rng.choice([1, 2, 3, 4, 5, 6], 5, replace=i % 2 == 0)
    files = rng.choice(12, 5, replace=False)
    return {
      "prompt": f"prompt {i}",
      **{f"jpg_{k}": FILES[f] for k, f in enumerate(files)},
      **{f"rank_{k}": int(r) for k, r in enumerate(ranks)},
    }

  return [row(i) for i in range(20)]


def open_singles(data, tally, kind):
  return [
    {"caption": f"caption {i}", "jpg": FILES[i % 12], "liked": bool(_rng(i).integers(2))}
    for i in range(30)
  ]
