"""Segmentation of an image into coloured regions, for the verifier.

Backgrounds are achromatic and objects are not, so regions are found in the chroma plane. Grey
grain and gradients of lightness vanish there, and low contrast shortens the chroma vectors
without changing their direction.
"""

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxpref.shapes import palette

SIDE = 64  # images are resized to this side; all lengths below are in these pixels
SPECK = 12  # pixels; smaller regions are ignored
_FAINTEST = 10.0  # smallest chroma of a region, in units of 1/255
_COLORED = 30.0  # chroma above which a background counts as coloured, in units of 1/255
_CHROMA_NOISE = 4.0  # assumed standard deviation of chroma, in units of 1/255
_COLORS = tuple(palette.OBJECTS)
_LEVELS = {name: np.mean(rgb) for name, rgb in palette.BACKGROUNDS.items()}


@dataclasses.dataclass(frozen=True)
class Region:
  """One coloured region; lengths are in pixels of the canvas.

  Attributes:
    color: name of the nearest colour of the palette.
    x: position of the centre from the left.
    y: position of the centre from the top.
    area: area with holes filled.
    contact: length along which the frame cuts the region.
    strength: ratio of its chroma to the palette colour's chroma.
    mask: pixels with a coverage above 1/2, bool [SIDE, SIDE].
    coverage: about 1 inside, 0 outside, and between at the edges, [SIDE, SIDE]. Mask and
      coverage exclude neighbouring regions.
  """

  color: str
  x: float
  y: float
  area: float
  contact: float
  strength: float
  mask: np.ndarray
  coverage: np.ndarray


def to_canvas(image: np.ndarray) -> np.ndarray:
  """Resizes an image to the canvas, float32 [SIDE, SIDE, 3] in [0, 255].

  Args:
    image: uint8 [H, W, 3].

  Raises:
    ValueError: the image has another dtype or shape.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"image must be uint8 [H, W, 3] (got {image.dtype} {image.shape})")
  if image.shape[:2] != (SIDE, SIDE):
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = np.asarray(resized)
  return image.astype(np.float32)


def chroma(colors: np.ndarray) -> np.ndarray:
  """Projects colours [..., 3] onto the plane orthogonal to the grey axis, [..., 2]."""
  red, green, blue = colors[..., 0], colors[..., 1], colors[..., 2]
  return np.stack([(red - green) / np.sqrt(2), (red + green - 2 * blue) / np.sqrt(6)], axis=-1)


def background_of(canvas: np.ndarray) -> str | None:
  """Names the background by the median colour; returns None if that is not grey."""
  color = np.median(canvas.reshape(-1, 3), axis=0)
  if np.linalg.norm(chroma(color)) > _COLORED:
    return None
  level = color.mean()
  return min(_LEVELS, key=lambda name: abs(_LEVELS[name] - level))


NEIGHBORS = ndimage.generate_binary_structure(2, 1)  # computed once, because it is slow
_Y, _X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
SLOPES = np.stack([np.ones_like(_X), _X, _Y], axis=-1)  # basis of linear gradients of lightness
_PALETTE = chroma(np.asarray([palette.OBJECTS[c] for c in _COLORS], float))
_CHROMA = np.linalg.norm(_PALETTE, axis=1)
_HUES = (_PALETTE / _CHROMA[:, None]).astype(np.float32)


def expand_labels(labels: np.ndarray, distance: float) -> np.ndarray:
  """Grows each label over the background pixels that are at most `distance` away from it."""
  away, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
  return np.where(away <= distance, labels[rows, columns], 0)


def find_regions(canvas: np.ndarray) -> list[Region]:
  """Finds the coloured regions, except specks.

  Args:
    canvas: float32 [SIDE, SIDE, 3], see `to_canvas`.
  """
  plane = chroma(canvas)
  plane -= np.median(plane.reshape(-1, 2), axis=0)  # removes a colour cast of the whole image
  plane = ndimage.gaussian_filter(plane, (0.5, 0.5, 0))
  length = np.sqrt(plane[..., 0] ** 2 + plane[..., 1] ** 2)
  labels = _split_by_hue(_label(length), plane, length)
  if not labels.any():
    return []
  pixels = np.concatenate([plane, _light(canvas, labels > 0)[..., None]], axis=-1)
  domains = expand_labels(labels, 5)
  regions = []
  for i in range(1, labels.max() + 1):
    core, domain = labels == i, domains == i
    direction, reach = _axis(plane[core])
    coverage = _coverage(pixels, core, domain)
    mask = _largest(coverage > 0.5)
    if mask.sum() < SPECK:
      continue
    hue = int(np.argmax(_HUES @ direction))
    rows, columns = np.nonzero(mask)
    frame = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum()
    regions.append(
      Region(
        color=_COLORS[hue],
        x=columns.mean() + 0.5,
        y=rows.mean() + 0.5,
        area=float(ndimage.binary_fill_holes(mask[box_of(mask, 1)], NEIGHBORS).sum()),
        contact=float(frame),
        strength=float(reach / _CHROMA[hue]),
        mask=mask,
        coverage=coverage,
      )
    )
  return regions


def _light(canvas: np.ndarray, objects: np.ndarray) -> np.ndarray:
  """Returns the lightness relative to the background, scaled to chroma's noise, [SIDE, SIDE].

  Grain of the background lowers the scale, because differences of lightness then mean less.
  """
  light = (canvas[..., 0] + canvas[..., 1] + canvas[..., 2]) / np.sqrt(3)
  light = ndimage.gaussian_filter(light, 0.5)
  outside = ~ndimage.binary_dilation(objects, NEIGHBORS, iterations=3)
  if not outside.any():
    return np.zeros_like(light)
  slope = np.linalg.lstsq(SLOPES[outside], light[outside], rcond=None)[0]
  light = light - SLOPES @ slope
  spread = float(np.median(np.abs(light[outside]))) / 0.6745
  return light * min(1.0, _CHROMA_NOISE / max(spread, 1e-6))


def _coverage(pixels: np.ndarray, core: np.ndarray, domain: np.ndarray) -> np.ndarray:
  """Estimates the coverage of each pixel by a region, from 0 (background) to 1 (object).

  Args:
    pixels: the two chroma coordinates and the relative lightness, [SIDE, SIDE, 3].
    core: pixels that certainly belong to the region, bool [SIDE, SIDE].
    domain: pixels that can belong to the region, bool [SIDE, SIDE].
  """
  direction, reach = _axis(pixels[core])
  return np.clip(np.where(domain, pixels @ direction / reach, 0), 0, 1.6)


def box_of(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
  """Returns the bounding box of a mask plus a margin, clipped to the image."""
  rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
  if not rows.size:
    return slice(0), slice(0)
  return (
    slice(max(rows[0] - margin, 0), rows[-1] + 1 + margin),
    slice(max(columns[0] - margin, 0), columns[-1] + 1 + margin),
  )


def _largest(mask: np.ndarray) -> np.ndarray:
  box = box_of(mask)
  labels, count = ndimage.label(mask[box], NEIGHBORS)
  if count < 2:
    return mask
  largest = np.zeros_like(mask)
  largest[box] = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
  return largest


def _label(length: np.ndarray) -> np.ndarray:
  """Labels components at half of their own maximum, so that blur does not move edges."""
  # Most pixels are background, so the median measures the background's blotches.
  floor = max(_FAINTEST, 0.25 * float(length.max()), 4 * float(np.median(length)))
  rough = _drop_specks(ndimage.label(length > floor, NEIGHBORS)[0])
  mask = np.zeros(length.shape, bool)
  for i, box in enumerate(ndimage.find_objects(rough), start=1):
    inside = rough[box] == i
    height = np.percentile(length[box][inside], 90)
    mask[box] |= inside & (length[box] > 0.5 * height)
  return _drop_specks(ndimage.label(mask, NEIGHBORS)[0])


def _drop_specks(labels: np.ndarray) -> np.ndarray:
  """Removes small components and renumbers the others from 1."""
  kept = np.bincount(labels.ravel()) >= SPECK
  kept[0] = False
  return np.where(kept, np.cumsum(kept), 0)[labels]


def _split_by_hue(labels: np.ndarray, plane: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Separates touching objects of different colours.

  A component is split if a second hue has more than 20 % of its saturated pixels. Single pixels
  of another hue do not split it.
  """
  pieces = np.zeros_like(labels)
  for i, box in enumerate(ndimage.find_objects(labels), start=1):
    inside = labels[box] == i
    hues = np.argmax(plane[box] @ _HUES.T, axis=-1)
    full = inside & (length[box] > 0.6 * length[box][inside].max())
    shares = np.bincount(hues[full], minlength=len(_HUES)) / max(full.sum(), 1)
    present = np.flatnonzero(shares > 0.2)
    if len(present) < 2:
      pieces[box][inside] = pieces.max() + 1
      continue
    nearest = np.argmax(plane[box] @ _HUES[present].T, axis=-1)
    for j in range(len(present)):
      part = ndimage.label(inside & (nearest == j), NEIGHBORS)[0]
      pieces[box][part > 0] = pieces.max() + part[part > 0]
  return _drop_specks(pieces)


def _axis(vectors: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns the mean direction of a region's colours [P, D], and their extent along it."""
  total = vectors.sum(axis=0)
  direction = total / max(float(np.linalg.norm(total)), 1e-6)
  return direction, max(float(np.percentile(vectors @ direction, 75)), 1e-6)


def is_whole(region: Region) -> bool:
  """Checks that the frame does not cut a region; a short contact does not count as a cut."""
  return region.contact <= max(2.0, 0.25 * float(np.sqrt(region.area)))
