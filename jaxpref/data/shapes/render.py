"""Draws prompts of the shapes world: a scene that satisfies a spec, then its pixels.

Every image is a function of its random generator alone: positions, sizes, angles, tints
and backgrounds vary, so that the diversity of a set of images can be measured.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from jaxpref.data.shapes import palette, prompts

SIZE = 64  # pixels, both ways
_OVERSAMPLE = 4
_MARGIN = 2.0  # pixels kept free at the frame
_GAP = 4.0  # pixels kept free between objects
_RADII = {"small": (6.5, 8.0), None: (9.0, 11.5), "large": (13.5, 16.0)}
_CROWDED_RADII = {3: (7.0, 8.8), 4: (6.5, 7.6), 5: (6.5, 7.0)}  # by number of objects
# Outer radius of each shape over the nominal one, so that all look equally large.
_REACH = {
  "circle": 1.0,
  "square": 1.25,
  "triangle": 1.35,
  "star": 1.35,
  "cross": 1.25,
  "ring": 1.1,
}


@dataclasses.dataclass(frozen=True)
class Object:
  """One drawn object; centre and nominal radius in pixels, angle in radians."""

  shape: str
  color: str
  x: float
  y: float
  radius: float
  angle: float

  @property
  def reach(self) -> float:
    """Distance in pixels from the centre within which all of it lies."""
    return self.radius * _REACH[self.shape]


@dataclasses.dataclass(frozen=True)
class Scene:
  """What an image shows, and how its pixels are spoiled."""

  objects: tuple[Object, ...]
  background: str
  blur: float = 0.0  # standard deviation in pixels
  noise: float = 0.0  # standard deviation of the grain, of 255
  contrast: float = 1.0  # 1 leaves the image as it is


def layout(spec: prompts.Spec, rng: np.random.Generator) -> Scene:
  """A random scene in which everything is as `spec` says, and nothing else is."""
  wanted = [t for t in spec.things for _ in range(t.count)]
  background = spec.background or prompts.BACKGROUNDS[rng.integers(4)]
  free_color = prompts.COLORS[rng.integers(8)]
  while True:
    objects: list[Object] = []
    for thing in wanted:
      color = thing.color or free_color
      if len(spec.things) == 2 and not thing.color:
        color = prompts.COLORS[rng.integers(8)]
      place_at = place(thing, color, objects, rng, total=len(wanted))
      if place_at is None:
        break
      objects.append(place_at)
    if len(objects) == len(wanted) and related(objects, spec.relation):
      return Scene(tuple(objects), background)


def place(
  thing: prompts.Thing,
  color: str,
  others: list[Object],
  rng: np.random.Generator,
  *,
  total: int,
) -> Object | None:
  """One more object, of `total`, clear of the frame and the others; None without room."""
  for _ in range(20):
    radius = rng.uniform(*_CROWDED_RADII.get(total, _RADII[thing.size]))
    room = _MARGIN + radius * _REACH[thing.shape]
    x, y = rng.uniform(room, SIZE - room, 2)
    new = Object(thing.shape, color, x, y, radius, rng.uniform(-0.2, 0.2))
    if all(math.hypot(o.x - x, o.y - y) > o.reach + new.reach + _GAP for o in others):
      return new
  return None


def related(objects: list[Object], relation: str | None) -> bool:
  """Whether the first object clearly stands in `relation` to the second."""
  if relation is None:
    return True
  dx, dy = objects[0].x - objects[1].x, objects[0].y - objects[1].y
  along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
  sign = -1 if relation in ("left of", "above") else 1
  return sign * along > 12.0 and abs(across) < 0.6 * abs(along)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
  """The scene's pixels, uint8 [64, 64, 3], anti-aliased."""
  image = _background(scene.background, rng)
  for thing in scene.objects:
    mask = _mask(thing)[..., None]
    image = image * (1 - mask) + _tint(thing, rng) * mask
  if scene.contrast < 1.0:
    image = image.mean() + scene.contrast * (image - image.mean())
  if scene.noise:
    image = image + scene.noise * _grain(rng)
  picture = Image.fromarray(np.clip(image + 0.5, 0, 255).astype(np.uint8))
  if scene.blur:
    picture = picture.filter(ImageFilter.GaussianBlur(scene.blur))
  return np.asarray(picture)


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
  """An achromatic ground with a slight slope of light."""
  level = np.asarray(palette.BACKGROUNDS[name], float).mean() + rng.uniform(-8, 8)
  slope = rng.uniform(-8, 8, 2)
  axis = np.linspace(-1, 1, SIZE)
  light = level + slope[0] * axis[:, None] + slope[1] * axis[None, :]
  return np.repeat(light[..., None], 3, axis=2)


def _tint(thing: Object, rng: np.random.Generator) -> np.ndarray:
  return np.asarray(palette.OBJECTS[thing.color], float) + rng.uniform(-9, 9, 3)


def _grain(rng: np.random.Generator) -> np.ndarray:
  """Zero-mean grey grain of unit deviation, as coarse as film's."""
  coarse = rng.standard_normal((SIZE // 2, SIZE // 2, 1))
  return np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1)


def _mask(thing: Object) -> np.ndarray:
  """Coverage of each pixel by the object, float [64, 64] in [0, 1]."""
  canvas = Image.new("L", (SIZE * _OVERSAMPLE, SIZE * _OVERSAMPLE))
  pen = ImageDraw.Draw(canvas)
  scale, centre = _OVERSAMPLE, np.array([thing.x, thing.y])
  if thing.shape in ("circle", "ring"):
    for radius, fill in ((1.0, 255), (0.52, 0)):
      if thing.shape == "circle" and not fill:
        continue
      low = (centre - radius * thing.reach) * scale
      high = (centre + radius * thing.reach) * scale
      pen.ellipse([*low, *high], fill=fill)
  else:
    turn = np.array(
      [
        [math.cos(thing.angle), -math.sin(thing.angle)],
        [math.sin(thing.angle), math.cos(thing.angle)],
      ]
    )
    outline = (centre + thing.reach * _OUTLINES[thing.shape] @ turn.T) * scale
    pen.polygon([tuple(p) for p in outline], fill=255)
  return np.asarray(canvas.reduce(_OVERSAMPLE), float) / 255


def _regular(corners: int, first: float) -> np.ndarray:
  angles = first + 2 * math.pi * np.arange(corners) / corners
  return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
  points = _regular(10, -math.pi / 2)
  points[1::2] *= 0.42
  return points


def _cross(width: float = 0.32) -> np.ndarray:
  arm = math.sqrt(1 - width**2)
  quarter = np.array([[arm, -width], [arm, width], [width, width]])
  corners = []
  for _ in range(4):
    corners.append(quarter)
    quarter = quarter @ np.array([[0, 1], [-1, 0]])
  return np.concatenate(corners)


# Corners on the unit circle, y downwards.
_OUTLINES = {
  "square": _regular(4, math.pi / 4),
  "triangle": _regular(3, -math.pi / 2),
  "star": _star(),
  "cross": _cross(),
}
