"""Rates the looks of an image, for the verifier, whatever the image should show."""

import numpy as np
from scipy import ndimage

from jaxpref.shapes import segmentation

GOOD = 0.55  # clean images are above, also when mildly soft or grainy; spoiled ones below
_OBJECT = 48  # pixels, of the canvas; about half of the smallest object
_HOLE = 20  # pixels; about half of the smallest ring's hole
_EDGE = 3  # pixels on either side of an edge that belong to it


def score(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """The product of what follows, in [0, 1]; 0 where nothing is seen.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    regions: what `segmentation.find_regions` sees in it.
  """
  # Smaller ones are dirt on the background, or what the frame has left of an object.
  objects = [region for region in regions if region.mask.sum() >= _OBJECT]
  if not objects:
    return 0.0
  parts = (sharpness(objects), evenness(canvas, objects), contrast(objects))
  return float(np.prod([*parts, wholeness(regions)]))


def sharpness(regions: list[segmentation.Region]) -> float:
  """From how steeply coverage rises at the edges: 1 within a pixel, 0 over five."""
  return float(np.mean([_ramp(edge_slope(region), 0.12, 0.38) for region in regions]))


def edge_slope(region: segmentation.Region) -> float:
  """Median rise of coverage a pixel where it passes one half."""
  box = segmentation.box_of(region.mask, 2)
  mask = region.mask[box]
  down, across = np.gradient(region.coverage[box])
  edge = mask ^ ndimage.binary_erosion(mask, segmentation.NEIGHBORS, border_value=1)
  edge |= mask ^ ndimage.binary_dilation(mask, segmentation.NEIGHBORS)
  return float(_median(np.hypot(down, across)[edge]))


def evenness(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """From what flat colours leave unexplained: 1 up to the rounding of pixels, 1/2 at 12.5."""
  excess = max(unevenness(canvas, regions) - 0.5, 0.0)
  return 1 / (1 + (excess / 12.0) ** 2)


def unevenness(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """Deviation of the image from flat objects on a flat background, of 255.

  The root mean square over channels and pixels of the background's, and that of the worst
  object's, the two added as squares. Grain, blotches of any size and colour, stray specks
  and shaded objects all count, by their contrast and the root of the area they cover.
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
  """The image minus its nearest explanation by flat colours, [SIDE, SIDE, 3].

  Well inside an object that is the object's colour and well outside the background's.
  Within `_EDGE` pixels of an edge any mixture of the two will do: `sharpness` judges those.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    regions: the objects.
    labels: number of the object that covers a pixel, from 1; 0 is the background.
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
    across = color - ground[box][edge]  # from the background's colour to the object's
    share = np.einsum("pc,pc->p", rest, across)
    share /= np.einsum("pc,pc->p", across, across).clip(1e-6)
    off = rest - share[:, None] * across
    distance = np.einsum("pc,pc->p", off, off)
    nearer = distance < least[box][edge]  # between two objects the better explanation counts
    where = tuple(index[nearer] for index in np.nonzero(edge))
    found[box][where], least[box][where] = off[nearer], distance[nearer]
  return found


def _without_pits(region: segmentation.Region) -> np.ndarray:
  """The region's mask with holes filled that are smaller than any object's."""
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
  """The background's colour at each pixel: one tint, under light with an even slope.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    where: what to fit, [SIDE, SIDE]; black and white pixels, whose light was cut off, are
      left out of the fit where there are others.
  """
  pixels = canvas.reshape(-1, 3)
  light = pixels @ np.full(3, 1 / 3, np.float32)
  known = where.ravel() if where.any() else np.ones(len(light), bool)
  within = known & (light > 1) & (light < 254)
  weight = (within if within.sum() > 0.1 * known.sum() else known).astype(np.float32)
  # By its normal equations, which are far smaller.
  terms = segmentation.SLOPES.reshape(-1, 3).astype(np.float32)
  weighed = (terms * weight[:, None]).T
  fit = np.linalg.lstsq(weighed @ terms, weighed @ light, rcond=None)[0]
  tint = (weight @ pixels - weight @ light) / weight.sum()
  return np.clip((terms @ fit)[:, None] + tint, 0, 255).reshape(canvas.shape)


def contrast(regions: list[segmentation.Region]) -> float:
  """From the objects' chroma: 1 at that of the palette, 0 at a third of it."""
  return _ramp(float(np.mean([r.strength for r in regions])), 0.3, 0.85)


def wholeness(regions: list[segmentation.Region]) -> float:
  """1 where the frame cuts nothing, less the longer a cut."""
  cut = max(r.contact / np.sqrt(r.area) for r in regions)
  return 1 - 0.8 * _ramp(cut, 0.1, 0.8)


def _median(values: np.ndarray) -> np.ndarray:
  """The middle along the first axis, of an even number the upper one."""
  return np.sort(values, axis=0)[len(values) // 2]


def _ramp(value: float, low: float, high: float) -> float:
  return float(np.clip((value - low) / (high - low), 0, 1))
