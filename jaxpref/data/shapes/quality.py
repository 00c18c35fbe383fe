"""Rates the looks of an image, for the verifier, whatever the image should show."""

import numpy as np
from scipy import ndimage

from jaxpref.data.shapes import segmentation

GOOD = 0.55  # clean images are above, also when mildly soft or grainy; spoiled ones below


def score(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """The product of what follows, in [0, 1]; 0 where nothing is seen.

  Args:
    canvas: float32 [SIDE, SIDE, 3] in [0, 255].
    regions: what `segmentation.find_regions` sees in it.
  """
  if not regions:
    return 0.0
  parts = (sharpness(regions), smoothness(canvas, regions), contrast(regions))
  return float(np.prod([*parts, wholeness(regions)]))


def sharpness(regions: list[segmentation.Region]) -> float:
  """From how steeply coverage rises at the edges: 1 within a pixel, 0 over five."""
  return _ramp(edge_slope(regions), 0.12, 0.38)


def edge_slope(regions: list[segmentation.Region]) -> float:
  """Median rise of coverage a pixel where it passes one half."""
  slopes = []
  for region in regions:
    down, across = np.gradient(region.coverage)
    edge = region.mask ^ ndimage.binary_erosion(region.mask, border_value=1)
    edge |= region.mask ^ ndimage.binary_dilation(region.mask)
    slopes.append(np.hypot(down, across)[edge])
  return float(np.median(np.concatenate(slopes)))


def smoothness(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """From the grain: 1 without, 0 at a deviation of 16 of 255."""
  return 1 - _ramp(grain(canvas, regions), 2.0, 14.0)


def grain(canvas: np.ndarray, regions: list[segmentation.Region]) -> float:
  """Standard deviation of the light around its local median, away from edges."""
  light = canvas.mean(axis=-1)
  objects = np.any([r.mask for r in regions], axis=0)
  flat = ~ndimage.binary_dilation(objects, iterations=4)
  rest = (light - ndimage.median_filter(light, 3))[flat]
  if not rest.size:
    return 0.0
  # Black and white cut off one side of the grain: the wider side tells.
  sides = np.mean(np.maximum(rest, 0) ** 2), np.mean(np.minimum(rest, 0) ** 2)
  return float(np.sqrt(2 * max(sides)))


def contrast(regions: list[segmentation.Region]) -> float:
  """From the objects' chroma: 1 at that of the palette, 0 at a third of it."""
  return _ramp(float(np.mean([r.strength for r in regions])), 0.3, 0.85)


def wholeness(regions: list[segmentation.Region]) -> float:
  """1 where the frame cuts nothing, less the longer a cut."""
  cut = max(r.contact / np.sqrt(r.area) for r in regions)
  return 1 - 0.8 * _ramp(cut, 0.1, 0.8)


def _ramp(value: float, low: float, high: float) -> float:
  return float(np.clip((value - low) / (high - low), 0, 1))
