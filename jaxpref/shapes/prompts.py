"""Captions of the shapes world in GenEval's six categories, and their meaning.

A caption and its `Spec` are equivalent: `caption(spec)` writes the text, and `parse(text)`
reads it. The split of a prompt is fixed: `split_of(spec)` holds out whole combinations of
attributes (a colour with a shape, a pair of shapes, a relation), so that no test prompt is a
paraphrase of a training prompt.
"""

import dataclasses
import functools
import itertools
import re
import zlib

import numpy as np

from jaxpref.shapes import palette

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = tuple(palette.OBJECTS)
BACKGROUNDS = tuple(palette.BACKGROUNDS)
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("one", "two", "three", "four")
CATEGORIES = (
  "single_object",
  "two_object",
  "counting",
  "colors",
  "position",
  "color_attribution",
)


@dataclasses.dataclass(frozen=True)
class Thing:
  """One kind of object that a prompt asks for; a None attribute can have any value."""

  shape: str
  color: str | None = None
  size: str | None = None
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Spec:
  """The meaning of a prompt: one or two things, their relation, the background.

  `relation` is the position of the first thing relative to the second.
  """

  category: str
  things: tuple[Thing, ...]
  relation: str | None = None
  background: str | None = None


def caption(spec: Spec) -> str:
  """Writes the prompt's text, e.g. "a red circle left of a star on a white background"."""
  words = []
  for thing in spec.things:
    attributes = [a for a in (thing.size, thing.color) if a]
    if spec.category == "counting":
      noun = thing.shape + _plural(thing.shape, thing.count)
      words.append(" ".join([COUNTS[thing.count - 1], *attributes, noun]))
    else:
      phrase = " ".join([*attributes, thing.shape])
      words.append(("an " if phrase[0] in "aeiou" else "a ") + phrase)
  text = f" {spec.relation or 'and'} ".join(words)
  return text + (f" on a {spec.background} background" if spec.background else "")


def _plural(shape: str, count: int) -> str:
  if count == 1:
    return ""
  return "es" if shape.endswith("s") else "s"


_THING = (
  r"(?P<n{i}>an?|one|two|three|four) (?:(?P<size{i}>small|large) )?"
  rf"(?:(?P<color{{i}}>{'|'.join(COLORS)}) )?(?P<shape{{i}}>{'|'.join(SHAPES)})(?:e?s)?"
)
_GRAMMAR = re.compile(
  _THING.format(i=0)
  + rf"(?: (?P<link>and|{'|'.join(RELATIONS)}) {_THING.format(i=1)})?"
  + rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


@functools.lru_cache(maxsize=65536)
def parse(text: str) -> Spec:
  """Parses a caption of the shapes world.

  Raises:
    ValueError: the text is not a caption of the shapes world.
  """
  found = _GRAMMAR.fullmatch(text.strip().lower())
  if not found:
    raise ValueError(f"not a prompt of the shapes world: {text!r}")
  part = found.groupdict()
  things = tuple(
    Thing(
      shape=part[f"shape{i}"],
      color=part[f"color{i}"],
      size=part[f"size{i}"],
      count=COUNTS.index(part[f"n{i}"]) + 1 if part[f"n{i}"] in COUNTS else 1,
    )
    for i in range(2)
    if part[f"shape{i}"]
  )
  return Spec(_category(part, things), things, _relation(part), part["background"])


def _relation(part: dict) -> str | None:
  return part["link"] if part["link"] in RELATIONS else None


def _category(part: dict, things: tuple[Thing, ...]) -> str:
  if _relation(part):
    return "position"
  if len(things) == 2:
    return "color_attribution" if things[0].color else "two_object"
  if part["n0"] in COUNTS:
    return "counting"
  return "colors" if things[0].color else "single_object"


def _specs(category: str) -> list[Spec]:
  """Lists all prompts of a category."""
  pairs = list(itertools.permutations(SHAPES, 2))
  backgrounds = (None, *BACKGROUNDS)
  sizes = (None, *SIZES)

  def one(things, relation=None):
    return [Spec(category, things, relation, b) for b in backgrounds]

  match category:
    case "single_object":
      parts = [one((Thing(s, size=z),)) for s in SHAPES for z in sizes]
    case "two_object":
      parts = [one((Thing(a), Thing(b))) for a, b in pairs]
    case "counting":
      parts = [
        one((Thing(s, color=c, count=n),))
        for s, c, n in itertools.product(SHAPES, (None, *COLORS), range(1, 5))
      ]
    case "colors":
      parts = [
        one((Thing(s, color=c, size=z),))
        for s, c, z in itertools.product(SHAPES, COLORS, sizes)
      ]
    case "position":
      parts = [
        one((Thing(a), Thing(b)), r) for (a, b), r in itertools.product(pairs, RELATIONS)
      ]
    case "color_attribution":
      colors = list(itertools.permutations(COLORS, 2))
      parts = [
        one((Thing(a, c), Thing(b, d))) for (a, b), (c, d) in itertools.product(pairs, colors)
      ]
    case _:
      raise ValueError(f"category must be one of {CATEGORIES} (got {category!r})")
  return [spec for part in parts for spec in part]


def _combination(spec: Spec) -> str:
  """Returns the combination that a split holds out; for short prompts the whole prompt."""
  if spec.category in ("single_object", "counting"):
    return caption(spec)
  things = [f"{t.color} {t.shape}" for t in spec.things]
  if spec.relation in ("right of", "below"):  # "a left of b" is "b right of a"
    things.reverse()
  elif not spec.relation:
    things.sort()
  axis = {"left of": "beside", "right of": "beside", "above": "over", "below": "over"}
  return " ".join([spec.category, axis.get(spec.relation or "", ""), *things])


def split_of(spec: Spec) -> str:
  """Returns 'test' for one combination in six, else 'train'; never changes."""
  digest = zlib.crc32(("shapes/1 " + _combination(spec)).encode())
  return "test" if digest % 6 == 0 else "train"


@functools.cache
def all_prompts(split: str) -> dict[str, tuple[Spec, ...]]:
  """Returns all prompts of a split by category.

  Args:
    split: 'train' or 'test'; the splits share no prompt and no combination.
  """
  if split not in ("train", "test"):
    raise ValueError(f"split must be 'train' or 'test' (got {split!r})")
  return {
    category: tuple(s for s in _specs(category) if split_of(s) == split)
    for category in CATEGORIES
  }


def draw_prompt(rng: np.random.Generator, split: str) -> Spec:
  """Samples a category uniformly, then one of its prompts uniformly."""
  category = CATEGORIES[rng.integers(len(CATEGORIES))]
  choices = all_prompts(split)[category]
  return choices[rng.integers(len(choices))]


def held_out(num_prompts: int, *, seed: int = 0) -> list[str]:
  """Samples distinct test prompts for an evaluation, as balanced over categories as possible.

  Args:
    num_prompts: number of prompts, at least 0.
    seed: seed of the choice.

  Raises:
    ValueError: `num_prompts` is larger than the number of test prompts.
  """
  rng = np.random.default_rng([seed, 0x7E57])
  queues = [list(rng.permutation(np.asarray(v, object))) for v in _test_captions()]
  if num_prompts > sum(map(len, queues)):
    raise ValueError(
      f"the shapes world has only {sum(map(len, queues))} test prompts (got {num_prompts})"
    )
  texts: list[str] = []
  for turn in itertools.count():
    if len(texts) == num_prompts:
      return texts
    queue = queues[turn % len(queues)]
    if queue:
      texts.append(queue.pop())
  raise AssertionError("unreachable")


def _test_captions() -> list[list[str]]:
  return [[caption(s) for s in specs] for specs in all_prompts("test").values()]
