"""The verifier's rating of how clean an image looks, whatever the prompt asks for."""

import numpy as np
from scipy import ndimage

from jaxpref.shapes import segmentation

GOOD = 0.55  # clean and slightly soft or grainy images score higher, flawed images lower
_OBJECT = 48  # pixels of the canvas; about half of the smallest object's area
_HOLE = 20  # pixels of the canvas; about half of the area of the smallest ring's hole
_EDGE = 3  # pixels on each side of an edge that count as the edge


def score(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """Returns the product of sharpness, evenness, contrast and wholeness, in [0, 1].

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    regions: from `segmentation.find_regions`; without objects the score is 0.
  """
  # Smaller regions are specks, or rests of objects that the frame cuts off.
  objects = [region for region in regions if region.mask.sum() >= _OBJECT]
  if not objects:
    return 0.0
  parts = (sharpness(objects), evenness(canvas, objects), contrast(objects))
  return float(np.prod([*parts, wholeness(regions)]))


def sharpness(regions: list[segmentation.Region]) -> float:
  """Rates how steeply coverage rises at edges: 1 within one pixel, 0 over five pixels."""
  return float(np.mean([_ramp(edge_slope(region), 0.12, 0.38) for region in regions]))


def edge_slope(region: segmentation.Region) -> float:
  """Returns the median slope of coverage per pixel at the edge, where coverage is 1/2."""
  box = segmentation.box_of(region.mask, 2)
  mask = region.mask[box]
  down, across = np.gradient(region.coverage[box])
  edge = mask ^ ndimage.binary_erosion(mask, segmentation.NEIGHBORS, border_value=1)
  edge |= mask ^ ndimage.binary_dilation(mask, segmentation.NEIGHBORS)
  return float(_median(np.hypot(down, across)[edge]))


def evenness(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """Rates how flat the colours are: 1 for an unevenness of at most 0.5, 1/2 at 12.5."""
  excess = max(unevenness(canvas, regions) - 0.5, 0.0)
  return 1 / (1 + (excess / 12.0) ** 2)


def unevenness(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """Returns the deviation from flat objects on a flat background, in units of 1/255.

  It is the root of the sum of two mean squares over pixels and channels: the background's and
  the worst object's. Grain, blotches of any size and colour, specks and shaded objects all
  count, in proportion to their contrast and the square root of their area.
  """
  labels = np.zeros(canvas.shape[:2], np.uint8)
  for i, region in enumerate(regions, start=1):
    labels[_without_pits(region)] = i
  rest = _residual(canvas, regions, labels)
  square = np.einsum("ijc,ijc->ij", rest, rest) / 3
  sums = np.bincount(labels.ravel(), square.ravel(), len(regions) + 1)
  means = sums / np.bincount(labels.ravel(), minlength=len(regions) + 1).clip(1)
  return float(np.sqrt(means[0] + means[1:].max()))


def _residual(
  canvas: np.ndarray, regions: list[segmentation.Region], labels: np.ndarray
) -> np.ndarray:
  """Returns the image minus its best fit with flat colours, [SIDE, SIDE, 3].

  The fit is the object's colour inside an object and the background's colour outside. Within
  `_EDGE` pixels of an edge it is any mixture of the two, since `sharpness` rates the edges.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    regions: the objects.
    labels: number of the object that covers each pixel, from 1; 0 is the background.
  """
  size = 2 * _EDGE + 1
  flat = ndimage.maximum_filter(labels, size) == ndimage.minimum_filter(labels, size)
  ground = _background(canvas, flat & (labels == 0))
  found = canvas - ground
  least = np.where(flat, 0, np.inf)
  for i, region in enumerate(regions, start=1):
    box = segmentation.box_of(region.mask, _EDGE)
    mine = labels[box] == i
    covered = np.where(mine, region.coverage[box], 0)
    color = _median(canvas[box][covered >= 0.9 * min(1.0, covered.max())])
    inside = flat[box] & mine
    found[box][inside] = canvas[box][inside] - color
    edge = ~flat[box] & ndimage.maximum_filter(mine, size)
    rest = canvas[box][edge] - ground[box][edge]
    across = color - ground[box][edge]  # from background to object colour
    share = np.einsum("pc,pc->p", rest, across)
    share /= np.einsum("pc,pc->p", across, across).clip(1e-6)
    off = rest - share[:, None] * across
    distance = np.einsum("pc,pc->p", off, off)
    nearer = distance < least[box][edge]  # between two objects, keeps the better fit
    where = tuple(index[nearer] for index in np.nonzero(edge))
    found[box][where], least[box][where] = off[nearer], distance[nearer]
  return found


def _without_pits(region: segmentation.Region) -> np.ndarray:
  """Returns the region's mask with all holes filled that are smaller than a ring's hole."""
  mask = region.mask
  if region.area == mask.sum():
    return mask
  box = segmentation.box_of(mask, 1)
  holes, _ = ndimage.label(ndimage.binary_fill_holes(mask[box]) ^ mask[box])
  small = np.bincount(holes.ravel()) < _HOLE
  filled = mask.copy()
  filled[box] |= (holes > 0) & small[holes]
  return filled


def _background(canvas: np.ndarray, where: np.ndarray) -> np.ndarray:
  """Fits the background's colour at each pixel: one tint with linearly varying lightness.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    where: pixels to fit, bool [SIDE, SIDE]. Black and white pixels, which may be clipped, are
      left out of the fit unless they are more than 90 %.
  """
  pixels = canvas.reshape(-1, 3)
  light = pixels @ np.full(3, 1 / 3, np.float32)
  known = where.ravel() if where.any() else np.ones(len(light), bool)
  within = known & (light > 1) & (light < 254)
  weight = (within if within.sum() > 0.1 * known.sum() else known).astype(np.float32)
  # Solves the normal equations, which are much smaller than the full system.
  terms = segmentation.SLOPES.reshape(-1, 3).astype(np.float32)
  weighed = (terms * weight[:, None]).T
  fit = np.linalg.lstsq(weighed @ terms, weighed @ light, rcond=None)[0]
  tint = (weight @ pixels - weight @ light) / weight.sum()
  return np.clip((terms @ fit)[:, None] + tint, 0, 255).reshape(canvas.shape)


def contrast(regions: list[segmentation.Region]) -> float:
  """Rates the objects' chroma: 1 from 0.85 of the palette's chroma on, 0 below 0.3 of it."""
  return _ramp(float(np.mean([r.strength for r in regions])), 0.3, 0.85)


def wholeness(regions: list[segmentation.Region]) -> float:
  """Returns 1 if the frame cuts no object, and less for longer cuts."""
  cut = max(r.contact / np.sqrt(r.area) for r in regions)
  return 1 - 0.8 * _ramp(cut, 0.1, 0.8)


def _median(values: np.ndarray) -> np.ndarray:
  """Returns the median along the first axis; of an even number, the upper middle value."""
  return np.sort(values, axis=0)[len(values) // 2]


def _ramp(value: float, low: float, high: float) -> float:
  return float(np.clip((value - low) / (high - low), 0, 1))
