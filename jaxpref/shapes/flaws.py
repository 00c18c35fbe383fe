"""Flaws of the base corpus at fixed rates, similar to those of images from the web.

Flaws of meaning make an image wrong for its prompt; flaws of looks only make it worse. An image
with a cropped object counts as wrong, because the object's shape cannot be recognized.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxpref.shapes import prompts, render

MEANING = ("missing_object", "wrong_count", "swapped_color", "swapped_relation")
LOOKS = ("cropped", "blur", "noise", "low_contrast")
# Probability of each flaw if it is applicable to the prompt. Flaws are sampled independently;
# of several flaws of meaning, only the first in this order is applied.
RATES: Mapping[str, float] = {
  "missing_object": 0.10,
  "wrong_count": 0.16,
  "swapped_color": 0.20,
  "swapped_relation": 0.22,
  "cropped": 0.10,
  "blur": 0.14,
  "noise": 0.12,
  "low_contrast": 0.14,
}


def applicable(spec: prompts.Spec) -> tuple[str, ...]:
  """Returns the flaws that an image of this prompt can have."""
  colored = any(t.color for t in spec.things)
  ruled_out = set() if colored else {"swapped_color"}
  if not spec.relation:
    ruled_out.add("swapped_relation")
  return tuple(f for f in RATES if f not in ruled_out)


def draw_flaws(spec: prompts.Spec, rng: np.random.Generator) -> tuple[str, ...]:
  """Samples the flaws of one image of the corpus at `RATES`."""
  drawn = [f for f in applicable(spec) if rng.random() < RATES[f]]
  meaning = [f for f in drawn if f in MEANING][:1]
  return tuple(meaning + [f for f in drawn if f in LOOKS])


def is_right(flaws: tuple[str, ...]) -> bool:
  """Checks whether an image with these flaws still shows what its prompt asks for."""
  return not any(f in MEANING or f == "cropped" for f in flaws)


def flawed_scene(
  spec: prompts.Spec, flaws: tuple[str, ...], rng: np.random.Generator
) -> render.Scene:
  """Samples a scene for `spec` that has exactly these flaws.

  Args:
    spec: the meaning of the prompt.
    flaws: names from `applicable(spec)`.
    rng: determines everything else.

  Raises:
    ValueError: a flaw is unknown or not applicable to this prompt.
  """
  if unknown := set(flaws) - set(applicable(spec)):
    raise ValueError(f"{sorted(unknown)} are not applicable to {prompts.caption(spec)!r}")
  if "swapped_relation" in flaws:
    spec = dataclasses.replace(spec, relation=_other(prompts.RELATIONS, spec, rng))
  if "swapped_color" in flaws:
    spec = _swap_color(spec, rng)
  scene = render.layout(spec, rng)
  if "missing_object" in flaws:
    scene = _drop(scene, rng)
  if "wrong_count" in flaws:
    scene = _recount(spec, scene, rng)
  if "cropped" in flaws:
    scene = _crop(scene, rng)
  if "blur" in flaws:
    scene = dataclasses.replace(scene, blur=rng.uniform(1.6, 2.4))
  if "noise" in flaws:
    scene = dataclasses.replace(scene, noise=rng.uniform(16, 24))
  if "low_contrast" in flaws:
    scene = dataclasses.replace(scene, contrast=rng.uniform(0.36, 0.5))
  return scene


def corpus_image(
  spec: prompts.Spec, rng: np.random.Generator, *, flawed: bool = True
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Samples one image of the base corpus, uint8 [64, 64, 3], and returns its flaws, too."""
  flaws = draw_flaws(spec, rng) if flawed else ()
  return render.draw(flawed_scene(spec, flaws, rng), rng), flaws


def _other(choices: tuple[str, ...], spec: prompts.Spec, rng: np.random.Generator):
  others = [c for c in choices if c != spec.relation]
  return others[rng.integers(len(others))]


def _swap_color(spec: prompts.Spec, rng: np.random.Generator) -> prompts.Spec:
  colors = [t.color for t in spec.things]
  if len(colors) == 2:
    colors.reverse()
  else:
    others = [c for c in prompts.COLORS if c != colors[0]]
    colors = [others[rng.integers(len(others))]]
  things = tuple(
    dataclasses.replace(t, color=c) for t, c in zip(spec.things, colors, strict=True)
  )
  return dataclasses.replace(spec, things=things)


def _drop(scene: render.Scene, rng: np.random.Generator) -> render.Scene:
  lost = rng.integers(len(scene.objects))
  kept = tuple(o for i, o in enumerate(scene.objects) if i != lost)
  return dataclasses.replace(scene, objects=kept)


def _recount(spec: prompts.Spec, scene: render.Scene, rng: np.random.Generator) -> render.Scene:
  """Adds an object, or removes one if the prompt asks for several."""
  if len(scene.objects) > 1 and spec.category == "counting" and rng.random() < 0.5:
    return _drop(scene, rng)
  twin = scene.objects[rng.integers(len(scene.objects))]
  things = [prompts.Thing(o.shape, o.color) for o in (*scene.objects, twin)]
  return dataclasses.replace(scene, objects=render.compose(things, rng))


def _crop(scene: render.Scene, rng: np.random.Generator) -> render.Scene:
  """Moves one object half out of the frame; its relation to the others stays the same."""
  if not scene.objects:
    return scene
  index = int(rng.integers(len(scene.objects)))
  victim = scene.objects[index]
  depth = rng.uniform(-0.1, 0.25) * victim.reach  # distance of its centre from the frame
  centres = np.array([[o.x, o.y] for o in scene.objects])
  # No other object can be between an object and its nearest side of the frame.
  distances = [victim.x, render.SIZE - victim.x, victim.y, render.SIZE - victim.y]
  side = int(np.argmin(distances))
  x, y = centres[index]
  x, y = [(depth, y), (render.SIZE - depth, y), (x, depth), (x, render.SIZE - depth)][side]
  moved = dataclasses.replace(victim, x=float(x), y=float(y))
  others = [o for i, o in enumerate(scene.objects) if i != index]
  return dataclasses.replace(scene, objects=(*others[:index], moved, *others[index:]))
