"""Aspect-ratio buckets: shapes of images that have about as many pixels as the model's own."""

import numpy as np


def shapes_of(size: int, unit: int) -> np.ndarray:
  """Returns the heights and widths of all buckets in pixels, int [K, 2].

  Args:
    size: height and width that the model was trained for.
    unit: of which heights and widths are multiples.

  Returns:
    For each height the widest shape with at most size x size pixels, from 1:2 to 2:1.
  """
  heights = np.arange(unit, 2 * size + 1, unit)
  widths = size * size // heights // unit * unit
  found = np.stack([heights, widths], axis=1)
  return found[(widths > 0) & (widths <= 2 * heights) & (heights <= 2 * widths)]


def assign(sizes: np.ndarray, shapes: np.ndarray, *, least: int) -> np.ndarray:
  """Returns the bucket of each image: that with the most similar proportions.

  Buckets with too few images are not used; their images go to the next most similar one.

  Args:
    sizes: heights and widths of images, int [N, 2].
    shapes: from `shapes_of`.
    least: smallest number of images of a bucket.
  """
  apart = np.abs(
    np.log(sizes[:, :1] / sizes[:, 1:]) - np.log(shapes[:, 0] / shapes[:, 1])[None]
  )
  usable = np.ones(len(shapes), bool)
  while True:
    chosen = np.argmin(np.where(usable, apart, np.inf), axis=1)
    counts = np.bincount(chosen, minlength=len(shapes))
    few = usable & (counts < least)
    if not few.any() or usable.sum() == 1:
      return chosen
    usable[np.argmin(np.where(few, counts, len(sizes) + 1))] = False
