"""The renderer of the shapes world: a random scene for a prompt, then its pixels.

An image depends only on the prompt and its random generator. Objects follow a composition: one
object is near the middle, two are beside or above each other, more are in a pattern. Exact
positions, sizes, tints, lighting and everything that the prompt leaves open vary, so that the
diversity of a set of images can be measured. The variation is limited to what a network of a
few million parameters can learn in an hour.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from jaxpref.shapes import palette, prompts

SIZE = 64  # height and width in pixels
_OVERSAMPLE = 4
_MARGIN = 2.0  # pixels kept free at the frame
_GAP = 4.0  # pixels kept free between objects
_LATTICE = 4  # pixels between possible positions of a centre
_RADII = {
  "small": (7.2, 8.2),
  None: (11.5, 14.0),
  "large": (17.0, 20.0),
}  # one object
# Ranges for several objects, by their number; no prompt asks for sizes of several objects.
_CROWDED_RADII = {2: (8.5, 10.2), 3: (8.5, 10.0), 4: (8.5, 9.6), 5: (6.5, 7.0)}
# Positions of the objects by their number, and the largest offset from them, in pixels.
_PATTERNS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
  1: (((32, 32),),),
  2: (((16, 32), (48, 32)), ((32, 16), (32, 48))),
  3: (((16, 16), (48, 16), (32, 48)), ((16, 48), (48, 48), (32, 16))),
  4: (((16, 16), (48, 16), (16, 48), (48, 48)),),
  5: (((16, 16), (48, 16), (16, 48), (48, 48), (32, 32)),),
}
_STRAY = {1: 8, 2: 4, 3: 4, 4: 4, 5: 4}
# Ratio of outer to nominal radius, so that all shapes look equally large.
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
  """One object of a scene; centre and nominal radius are in pixels."""

  shape: str
  color: str
  x: float
  y: float
  radius: float

  @property
  def reach(self) -> float:
    """Outer radius in pixels: the whole object is within this distance of its centre."""
    return self.radius * _REACH[self.shape]


@dataclasses.dataclass(frozen=True)
class Scene:
  """The contents of an image, and the degradation of its pixels."""

  objects: tuple[Object, ...]
  background: str
  blur: float = 0.0  # standard deviation in pixels
  noise: float = 0.0  # standard deviation of the grain, in units of 1/255
  contrast: float = 1.0  # factor; 1 does not change the image


def layout(spec: prompts.Spec, rng: np.random.Generator) -> Scene:
  """Samples a scene that shows exactly what `spec` asks for."""
  background = spec.background or prompts.BACKGROUNDS[rng.integers(4)]
  free_color = prompts.COLORS[rng.integers(8)]
  wanted = []
  for thing in spec.things:
    color = thing.color or free_color
    if len(spec.things) == 2 and not thing.color:
      color = prompts.COLORS[rng.integers(8)]
    wanted += [dataclasses.replace(thing, color=color)] * thing.count
  while True:
    objects = compose(wanted, rng)
    if related(objects, spec.relation):
      return Scene(objects, background)


def compose(things: Sequence[prompts.Thing], rng: np.random.Generator) -> tuple[Object, ...]:
  """Places one object per thing, at most five, away from the frame and each other."""
  total = len(things)
  patterns = _PATTERNS[total]
  while True:
    slots = rng.permutation(patterns[rng.integers(len(patterns))])
    objects = [_stand(t, slot, total, rng) for t, slot in zip(things, slots, strict=True)]
    if all(map(_inside, objects)) and all(
      math.hypot(a.x - b.x, a.y - b.y) > a.reach + b.reach + _GAP
      for a, b in itertools.combinations(objects, 2)
    ):
      return tuple(objects)


def _stand(
  thing: prompts.Thing, slot: np.ndarray, total: int, rng: np.random.Generator
) -> Object:
  radius = rng.uniform(*_CROWDED_RADII.get(total, _RADII[thing.size]))
  most = _STRAY[total] // _LATTICE
  x, y = slot + _LATTICE * rng.integers(-most, most + 1, 2)
  return Object(thing.shape, thing.color or "", float(x), float(y), radius)


def _inside(thing: Object) -> bool:
  room = thing.reach + _MARGIN
  return all(room <= place <= SIZE - room for place in (thing.x, thing.y))


def related(objects: Sequence[Object], relation: str | None) -> bool:
  """Checks whether the first object is clearly in `relation` to the second."""
  if relation is None:
    return True
  dx, dy = objects[0].x - objects[1].x, objects[0].y - objects[1].y
  along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
  sign = -1 if relation in ("left of", "above") else 1
  return sign * along > 12.0 and abs(across) < 0.6 * abs(along)


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
  """Renders a scene with anti-aliasing, uint8 [64, 64, 3]."""
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
  """Returns a grey background with a small gradient of lightness."""
  level = np.asarray(palette.BACKGROUNDS[name], float).mean() + rng.uniform(-8, 8)
  slope = rng.uniform(-8, 8, 2)
  axis = np.linspace(-1, 1, SIZE)
  light = level + slope[0] * axis[:, None] + slope[1] * axis[None, :]
  return np.repeat(light[..., None], 3, axis=2)


def _tint(thing: Object, rng: np.random.Generator) -> np.ndarray:
  return np.asarray(palette.OBJECTS[thing.color], float) + rng.uniform(-9, 9, 3)


def _grain(rng: np.random.Generator) -> np.ndarray:
  """Samples grey grain of zero mean and unit deviation, 2 x 2 pixels coarse."""
  coarse = rng.standard_normal((SIZE // 2, SIZE // 2, 1))
  return np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1)


def _mask(thing: Object) -> np.ndarray:
  """Returns the object's coverage of each pixel, float [64, 64] in [0, 1]."""
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
    outline = (centre + thing.reach * _OUTLINES[thing.shape]) * scale
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
