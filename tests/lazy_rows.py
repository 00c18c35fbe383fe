"""A data source of small images that are made when they are read."""

import functools
import io
import os

import numpy as np
from PIL import Image


@functools.cache
def _file(k):
  pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(pixels).save(out := io.BytesIO(), "PNG")
  return out.getvalue()


class _Rows:
  def __len__(self):
    return int(os.environ["LAZY_ROWS"])

  def __getitem__(self, i):
    return {"caption": f"row {i}", "jpg": _file(i % 16)}


def open_images(data, tally, kind):
  return _Rows()
