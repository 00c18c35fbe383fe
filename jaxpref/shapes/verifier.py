"""The judge of the shapes world: rates an image against its prompt from pixels alone.

It segments the image by colour (`segmentation`), names each region after the most similar
silhouette (`silhouettes`), and compares the objects with the meaning of the prompt. An image is
correct in the sense of GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513) if it
shows the objects of the prompt with the right number, colours, sizes and positions. In
addition, it must not show other objects, and the frame must not cut any object.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxpref.shapes import prompts, quality, segmentation, silhouettes

# Radius of a disk of equal area, relative to the image's side; between the two limits an object
# is neither small nor large.
SMALL_BELOW = 0.15
LARGE_ABOVE = 0.2


@dataclasses.dataclass(frozen=True)
class Found:
  """One object found in an image.

  Attributes:
    shape: name of the shape; None if it is unknown.
    color: name of the colour.
    x: position of the centre from the left, in pixels.
    y: position of the centre from the top, in pixels.
    radius: radius of a disk with the same area, holes filled, in pixels.
    whole: False if the frame cuts the object.
  """

  shape: str | None
  color: str
  x: float
  y: float
  radius: float
  whole: bool


def find_objects(image: np.ndarray) -> tuple[list[Found], str | None]:
  """Finds the objects of an image and the name of its background (None if it is coloured).

  Args:
    image: uint8 [H, W, 3].

  Raises:
    ValueError: the image has another shape or dtype.
  """
  canvas = segmentation.to_canvas(image)
  found = _name(segmentation.find_regions(canvas))
  down, across = np.asarray(image.shape[:2]) / segmentation.SIDE
  scaled = [
    dataclasses.replace(
      f, x=f.x * across, y=f.y * down, radius=f.radius * float(np.sqrt(across * down))
    )
    for f in found
  ]
  return scaled, segmentation.background_of(canvas)


def is_correct(image: np.ndarray, prompt: str) -> bool:
  """Checks whether the image shows exactly what the prompt asks for.

  Args:
    image: uint8 [H, W, 3].
    prompt: a caption of the shapes world.

  Raises:
    ValueError: the image has another shape or dtype, or the prompt is not such a caption.
  """
  return explain(image, prompt) == "right"


def explain(image: np.ndarray, prompt: str) -> str:
  """Returns "right" or the first difference, such as "2 circles instead of 3".

  Takes the arguments of `is_correct` and raises the same errors.
  """
  canvas = segmentation.to_canvas(image)
  found = _name(segmentation.find_regions(canvas))
  return _verdict(found, segmentation.background_of(canvas), prompts.parse(prompt))


def visual_quality(image: np.ndarray) -> float:
  """Rates how clean an image, uint8 [H, W, 3], looks, from 0 to 1, independent of the prompt.

  The rating is the product of sharpness, evenness, contrast and wholeness, and 0 without any
  object. Clean images have a rating above `quality.GOOD`.
  """
  canvas = segmentation.to_canvas(image)
  return quality.score(canvas, segmentation.find_regions(canvas))


def verify(
  images: np.ndarray | Sequence[np.ndarray], texts: Sequence[str]
) -> dict[str, np.ndarray]:
  """Judges many images, each against its own prompt.

  Args:
    images: uint8 [N, H, W, 3].
    texts: N captions of the shapes world.

  Returns:
    `correct`: bool [N], see `is_correct`; `quality`: float64 [N], see `visual_quality`.

  Raises:
    ValueError: the numbers of images and texts differ, an image has another shape or dtype, or
      a text is not such a caption.
  """
  correct, looks = [], []
  for image, text in zip(images, texts, strict=True):
    canvas = segmentation.to_canvas(image)
    regions = segmentation.find_regions(canvas)
    background = segmentation.background_of(canvas)
    correct.append(_verdict(_name(regions), background, prompts.parse(text)) == "right")
    looks.append(quality.score(canvas, regions))
  return {"correct": np.array(correct, bool), "quality": np.array(looks, float)}


def _name(regions: list[segmentation.Region]) -> list[Found]:
  return [
    Found(
      shape=silhouettes.closest(r.coverage)[0],
      color=r.color,
      x=r.x,
      y=r.y,
      radius=float(np.sqrt(r.area / np.pi)),
      whole=segmentation.is_whole(r),
    )
    for r in regions
  ]


def _verdict(found: list[Found], background: str | None, spec: prompts.Spec) -> str:
  """Returns the result of `explain`, with lengths in pixels of the canvas."""
  for f in found:
    if not f.whole:
      return f"the {_noun(f)} is cut by the frame"
  if wrong := _miscounted(found, spec):
    return wrong
  wanted = [t for t in spec.things for _ in range(t.count)]
  # Assigns the objects to the things in the order with the fewest differences.
  orders = (list(zip(wanted, o, strict=True)) for o in itertools.permutations(found))
  wrongs = min((_differences(pairs, spec) for pairs in orders), key=len)
  if wrongs:
    return wrongs[0]
  if spec.background and background != spec.background:
    return f"the background is {background or 'colored'}, not {spec.background}"
  return "right"


def _miscounted(found: list[Found], spec: prompts.Spec) -> str | None:
  wanted: Counter = Counter()
  for thing in spec.things:
    wanted[thing.shape] += thing.count
  seen = Counter(f.shape for f in found)
  extras = [f"{_article(f)} {_noun(f)}" for f in found if f.shape not in wanted]
  for shape, count in wanted.items():
    if not seen[shape]:
      return f"no {shape}" + (f", but {' and '.join(extras)}" if extras else "")
    if seen[shape] != count:
      return f"{_number(seen[shape], shape)} instead of {count}"
  return f"also {' and '.join(extras)}" if extras else None


def _differences(pairs: list[tuple[prompts.Thing, Found]], spec: prompts.Spec) -> list[str]:
  """Lists the differences between things and the objects assigned to them."""
  wrongs = []
  for thing, f in pairs:
    if f.shape != thing.shape:
      wrongs.append(f"{f.shape} instead of {thing.shape}")
    if thing.color and f.color != thing.color:
      wrongs.append(f"the {f.shape} is {f.color}, not {thing.color}")
    if thing.size and not _is_size(f.radius / segmentation.SIDE, thing.size):
      wrongs.append(f"the {f.shape} is not {thing.size}")
  if spec.relation:
    first, second = spec.things
    a, b = ([f for t, f in pairs if t is thing] for thing in (first, second))
    if not _stands(_centre(a) - _centre(b), spec.relation):
      wrongs.append(f"the {first.shape} is not {spec.relation} the {second.shape}")
  return wrongs


def _is_size(radius: float, size: str) -> bool:
  return radius < SMALL_BELOW if size == "small" else radius > LARGE_ABOVE


def _centre(group: list[Found]) -> np.ndarray:
  return np.mean([(f.x, f.y) for f in group], axis=0)


def _stands(offset: np.ndarray, relation: str) -> bool:
  """Checks whether an offset [2] (right, down) points mostly in the direction of `relation`."""
  way = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
  along = float(offset @ np.asarray(way[relation], float))
  return along > 0 and along >= np.abs(offset).max()


def _noun(f: Found) -> str:
  return f"{f.color} {f.shape or 'object of no known shape'}"


def _article(f: Found) -> str:
  return "an" if f.color[0] in "aeiou" else "a"


def _number(count: int, shape: str) -> str:
  if count == 1:
    return f"1 {shape}"
  return f"{count} {shape}{'es' if shape.endswith('s') else 's'}"
