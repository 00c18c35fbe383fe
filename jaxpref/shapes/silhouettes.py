"""Classification of a region's shape by the most similar ideal silhouette.

The ideals are geometric figures (a pentagram, a cross of five squares, ...) at all angles and
several degrees of blur, normalised in size and position. A region has the shape of the ideal
with the highest correlation, or no shape if that correlation is low.
"""

import functools

import numpy as np
from scipy import ndimage

_GRID = 20  # samples across a silhouette
_SPAN = 1.9  # half width of the sampled window, in radii of a disk of equal area
_CANVAS = 96  # side of the canvas of the ideals, in pixels
_REACH = 22.0  # outer radius of an ideal on that canvas
_BLURS = (0.06, 0.12, 0.20, 0.30, 0.40)  # standard deviations, in radii of equal area
_LEAST = 0.90  # smallest correlation with which a region has a shape


def normalise(coverage: np.ndarray) -> np.ndarray:
  """Normalises a region in size, position, mean (0) and norm (1), [_GRID**2].

  Args:
    coverage: coverage of the pixels by the region, [H, W]; not all zero.
  """
  full = np.percentile(coverage[coverage > 0.3 * coverage.max()], 75)
  inside = coverage > 0.5 * full
  y, x = ndimage.center_of_mass(inside)
  offsets = np.linspace(-1, 1, _GRID) * _SPAN * np.sqrt(inside.sum() / np.pi)
  where = np.meshgrid(y + offsets, x + offsets, indexing="ij")
  patch = ndimage.map_coordinates(coverage, where, order=1, mode="constant").ravel()
  patch = patch - patch.mean()
  return patch / max(float(np.linalg.norm(patch)), 1e-6)


def closest(coverage: np.ndarray) -> tuple[str | None, float]:
  """Returns the name of the best shape (None if it is not similar) and its correlation."""
  names, ideals = _ideals()
  scores = ideals @ normalise(coverage)
  best = int(np.argmax(scores))
  score = float(scores[best])
  return (names[best] if score >= _LEAST else None), score


@functools.cache
def _ideals() -> tuple[tuple[str, ...], np.ndarray]:
  """Returns the names and the normalised silhouettes, [names, _GRID**2]."""
  drawn: list[tuple[str, np.ndarray]] = [("circle", _disk(1.0))]
  drawn += [("ring", _disk(1.0) - _disk(hole)) for hole in (0.4, 0.5, 0.6)]
  for name, corners, period in _polygons():
    for turn in np.arange(0, period, np.radians(6)):
      drawn.append((name, _polygon(corners * np.exp(1j * turn))))
  names, ideals = [], []
  for name, silhouette in drawn:
    radius = np.sqrt(silhouette.sum() / np.pi)
    for blur in _BLURS:
      coverage = ndimage.gaussian_filter(silhouette, blur * radius)
      names.append(name)
      ideals.append(normalise(coverage))
  return tuple(names), np.stack(ideals)


def _polygons() -> list[tuple[str, np.ndarray, float]]:
  """Returns names, corners as complex numbers in the unit disk, and angles of symmetry."""
  circle = 2 * np.pi
  star = _regular(10)
  arms = np.array([3 + 1j, 1 + 1j, 1 + 3j])
  cross = np.concatenate([arms * 1j**k for k in range(4)]) / abs(3 + 1j)
  return [
    ("triangle", _regular(3), circle / 3),
    ("square", _regular(4), circle / 4),
    ("cross", cross, circle / 4),
    # The pentagram, and a star with wider arms.
    ("star", star * np.tile([1, 0.382], 5), circle / 5),
    ("star", star * np.tile([1, 0.5], 5), circle / 5),
  ]


def _regular(corners: int) -> np.ndarray:
  return np.exp(2j * np.pi * np.arange(corners) / corners)


def _polygon(corners: np.ndarray) -> np.ndarray:
  points = np.stack([corners.imag, corners.real], axis=1) * _REACH + _CANVAS / 2
  return fill_polygon(points, _CANVAS)


def fill_polygon(points: np.ndarray, side: int) -> np.ndarray:
  """Draws a polygon: 1 at pixels inside of it or on its edge, float32 [side, side].

  Args:
    points: rows and columns of its corners, [N, 2].
    side: of the image, in pixels.
  """
  # An edge crosses a pixel's row to its right or left; an odd number of crossings to one side
  # means inside. On an edge only one of the two sides has an odd number.
  right, left, corner = np.zeros((3, side, side), bool)
  rows, columns = (points.T[:, :, None, None] - np.mgrid[:side, :side][:, None]).astype(float)
  for i in range(len(points)):
    y0, y1, x0, x1 = rows[i], rows[i - 1], columns[i], columns[i - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
      crossing = (x0 * y1 - x1 * y0) / (y1 - y0)
    right ^= ((y0 > 0) != (y1 > 0)) & (crossing > 0)
    left ^= ((y0 < 0) != (y1 < 0)) & (crossing < 0)
    corner |= (np.abs(y0) < 1e-12) & (np.abs(x0) < 1e-12)
  return (right | left | corner).astype(np.float32)


def _disk(radius: float) -> np.ndarray:
  row, column = (np.mgrid[:_CANVAS, :_CANVAS] - _CANVAS / 2) / (radius * _REACH)
  return (row**2 + column**2 < 1).astype(np.float32)
