"""Finds the coloured regions of an image, for the verifier; knows nothing of shapes.

Backgrounds are achromatic and objects are not, so everything is measured in the plane of
chroma: grey grain and slopes of light vanish there, and poor contrast only shortens the
vectors without turning them.
"""

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxpref.shapes import palette

SIDE = 64  # pixels to which images are brought, so that every length below is relative
SPECK = 12  # pixels; smaller regions are dirt
_FAINTEST = 10.0  # chroma under which nothing is seen, of 255
_COLORED = 30.0  # chroma of 255 over which a background has a colour
_CHROMA_NOISE = 4.0  # what is taken for the standard deviation of chroma, of 255
_COLORS = tuple(palette.OBJECTS)
_LEVELS = {name: np.mean(rgb) for name, rgb in palette.BACKGROUNDS.items()}


@dataclasses.dataclass(frozen=True)
class Region:
  """One coloured region; lengths in pixels of an image of side `SIDE`.

  `area` has the holes filled; `contact` is the length along which the frame cuts it;
  `strength` is its chroma over that of its colour in the palette. `mask` [SIDE, SIDE] is
  where it is more than half covered; `coverage` [SIDE, SIDE] is about 1 inside, 0 outside
  and soft at the edges. Neighbours are in neither.
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
  """The image as float32 [SIDE, SIDE, 3] in [0, 255].

  Args:
    image: uint8 [H, W, 3].

  Raises:
    ValueError: it is something else.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
    raise ValueError(f"image is uint8 [H, W, 3], not {image.dtype} {image.shape}")
  if image.shape[:2] != (SIDE, SIDE):
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    image = np.asarray(resized)
  return image.astype(np.float32)


def chroma(colors: np.ndarray) -> np.ndarray:
  """Coordinates [..., 2] of colours [..., 3] in the plane across the grey axis."""
  red, green, blue = colors[..., 0], colors[..., 1], colors[..., 2]
  return np.stack([(red - green) / np.sqrt(2), (red + green - 2 * blue) / np.sqrt(6)], axis=-1)


def background_of(canvas: np.ndarray) -> str | None:
  """The background's name, after what most pixels show; None where that is a colour."""
  color = np.median(canvas.reshape(-1, 3), axis=0)
  if np.linalg.norm(chroma(color)) > _COLORED:
    return None
  level = color.mean()
  return min(_LEVELS, key=lambda name: abs(_LEVELS[name] - level))


NEIGHBORS = ndimage.generate_binary_structure(2, 1)  # made once: it takes as long as its use
_Y, _X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
SLOPES = np.stack([np.ones_like(_X), _X, _Y], axis=-1)  # of an even light, to be combined
_PALETTE = chroma(np.asarray([palette.OBJECTS[c] for c in _COLORS], float))
_CHROMA = np.linalg.norm(_PALETTE, axis=1)
_HUES = (_PALETTE / _CHROMA[:, None]).astype(np.float32)


def expand_labels(labels: np.ndarray, distance: float) -> np.ndarray:
  """Grows each label over the background pixels that are at most `distance` away from it."""
  away, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
  return np.where(away <= distance, labels[rows, columns], 0)


def find_regions(canvas: np.ndarray) -> list[Region]:
  """The coloured regions, specks left out.

  Args:
    canvas: float32 [SIDE, SIDE, 3], see `to_canvas`.
  """
  plane = chroma(canvas)
  plane -= np.median(plane.reshape(-1, 2), axis=0)  # a cast of colour over everything
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
  """Lightness over the background's slope, in units of chroma's noise, [SIDE, SIDE].

  The grainier the background, the less a difference of light means.
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
  """Soft coverage of a region: how far each pixel is from background to object.

  Args:
    pixels: two chromas and lightness over the background's [SIDE, SIDE, 3].
    core: where the region surely is [SIDE, SIDE].
    domain: outside of this the region is not [SIDE, SIDE].
  """
  direction, reach = _axis(pixels[core])
  return np.clip(np.where(domain, pixels @ direction / reach, 0), 0, 1.6)


def box_of(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
  """The smallest box around a mask with a margin, as far as the image goes."""
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
  """Components above half of their own height, so that blur moves no edge."""
  # Most pixels are background, so the median tells how blotchy it is.
  floor = max(_FAINTEST, 0.25 * float(length.max()), 4 * float(np.median(length)))
  rough = _drop_specks(ndimage.label(length > floor, NEIGHBORS)[0])
  mask = np.zeros(length.shape, bool)
  for i, box in enumerate(ndimage.find_objects(rough), start=1):
    inside = rough[box] == i
    height = np.percentile(length[box][inside], 90)
    mask[box] |= inside & (length[box] > 0.5 * height)
  return _drop_specks(ndimage.label(mask, NEIGHBORS)[0])


def _drop_specks(labels: np.ndarray) -> np.ndarray:
  """The labels that are left, numbered from 1 without gaps."""
  kept = np.bincount(labels.ravel()) >= SPECK
  kept[0] = False
  return np.where(kept, np.cumsum(kept), 0)[labels]


def _split_by_hue(labels: np.ndarray, plane: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Parts touching objects of different colours; an odd pixel keeps its neighbours' hue.

  A component is split when a second hue has a good share of its full-coloured pixels.
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
  """The direction of a region's colours [P, D], and how far along it they reach."""
  total = vectors.sum(axis=0)
  direction = total / max(float(np.linalg.norm(total)), 1e-6)
  return direction, max(float(np.percentile(vectors @ direction, 75)), 1e-6)


def is_whole(region: Region) -> bool:
  """Whether the frame leaves a region whole; to graze the frame is not to be cut."""
  return region.contact <= max(2.0, 0.25 * float(np.sqrt(region.area)))
