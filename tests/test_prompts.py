"""Prompts of the shapes world: their grammar, their split, what an evaluation draws."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jaxpref.shapes import prompts
from jaxpref.shapes.prompts import COLORS, RELATIONS, SHAPES, Spec, Thing

_OTHER_SIDE = {
  "left of": "right of",
  "right of": "left of",
  "above": "below",
  "below": "above",
}


def _all(split):
  return [spec for specs in prompts.all_prompts(split).values() for spec in specs]


def test_captions_by_hand():
  cases = {
    "a circle": Spec("single_object", (Thing("circle"),)),
    "a small star on a gray background": Spec(
      "single_object", (Thing("star", size="small"),), background="gray"
    ),
    "an orange ring": Spec("colors", (Thing("ring", "orange"),)),
    "a large orange ring": Spec("colors", (Thing("ring", "orange", "large"),)),
    "one cross": Spec("counting", (Thing("cross"),)),
    "three blue crosses": Spec("counting", (Thing("cross", "blue", count=3),)),
    "two squares": Spec("counting", (Thing("square", count=2),)),
    "a star and a ring": Spec("two_object", (Thing("star"), Thing("ring"))),
    "a star below a ring on a black background": Spec(
      "position", (Thing("star"), Thing("ring")), "below", "black"
    ),
    "an orange star and a red ring": Spec(
      "color_attribution", (Thing("star", "orange"), Thing("ring", "red"))
    ),
  }
  for text, spec in cases.items():
    assert prompts.caption(spec) == text
    assert prompts.parse(text) == spec


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_and_specs_are_one_to_one(split):
  specs = _all(split)
  for spec in specs:
    assert prompts.parse.__wrapped__(prompts.caption(spec)) == spec
  assert len({prompts.caption(s) for s in specs}) == len(specs)


def test_counts():
  def sizes(split):
    return {c: len(v) for c, v in prompts.all_prompts(split).items()}

  train, test = sizes("train"), sizes("test")
  # With 5 grounds (one of them left open): 6 shapes x 3 sizes; 30 ordered pairs;
  # 6 shapes x 9 colours x 4 counts; 6 x 8 x 3; 30 x 4 relations; 30 x 56 colour pairs.
  assert {c: train[c] + test[c] for c in prompts.CATEGORIES} == {
    "single_object": 90,
    "two_object": 150,
    "counting": 1080,
    "colors": 720,
    "position": 600,
    "color_attribution": 8400,
  }
  # The split is fixed for ever: published numbers rest on it.
  assert test == {
    "single_object": 13,
    "two_object": 30,
    "counting": 165,
    "colors": 75,
    "position": 140,
    "color_attribution": 1240,
  }
  assert len(SHAPES) >= 6
  assert len(COLORS) >= 8


def _combinations(spec):
  """All wordings of what is held out with a prompt, enumerated the long way."""
  if spec.category in ("single_object", "counting"):
    return {(spec,)}
  things = tuple((t.shape, t.color) for t in spec.things)
  if spec.category == "position":
    swapped = (*things[::-1], _OTHER_SIDE[spec.relation])
    return {(*things, spec.relation), swapped}
  return {(spec.category, *order) for order in itertools.permutations(things)}


def test_no_test_combination_is_in_train():
  seen = {split: set() for split in ("train", "test")}
  for split, combinations in seen.items():
    combinations.update(c for spec in _all(split) for c in _combinations(spec))
  assert not seen["train"] & seen["test"]
  assert not {prompts.caption(s) for s in _all("train")} & {
    prompts.caption(s) for s in _all("test")
  }


def test_split_is_seen_by_every_shape_color_and_relation():
  for split in ("train", "test"):
    specs = _all(split)
    assert {t.shape for s in specs for t in s.things} == set(SHAPES)
    assert {t.color for s in specs for t in s.things} == {None, *COLORS}
    assert {s.relation for s in specs} == {None, *RELATIONS}


@pytest.mark.parametrize(
  "text",
  ["", "a dog", "a red", "five circles", "a circle left a ring", "a ring on a red background"],
)
def test_other_texts_are_refused(text):
  with pytest.raises(ValueError, match="not a prompt of the shapes world"):
    prompts.parse(text)


def test_parse_minds_neither_case_nor_surrounding_space():
  assert prompts.parse(" A Red Circle\n") == prompts.parse("a red circle")


def test_draw_prompt_draws_categories_alike():
  rng = np.random.default_rng(0)
  drawn = [prompts.draw_prompt(rng, "train") for _ in range(6000)]
  assert all(prompts.split_of(s) == "train" for s in drawn)
  counts = Counter(s.category for s in drawn)
  # Five standard deviations of a binomial of 6000 at 1 / 6.
  assert all(abs(counts[c] - 1000) < 5 * 28.9 for c in prompts.CATEGORIES)


def test_held_out_is_balanced_and_deterministic():
  texts = prompts.held_out(72, seed=5)
  assert len(set(texts)) == 72
  assert Counter(prompts.parse(t).category for t in texts) == dict.fromkeys(
    prompts.CATEGORIES, 12
  )
  assert all(prompts.split_of(prompts.parse(t)) == "test" for t in texts)
  assert prompts.held_out(72, seed=5) == texts
  assert prompts.held_out(72, seed=6) != texts
  # More prompts are the same ones and others: results of two sizes can be compared.
  assert prompts.held_out(90, seed=5)[:72] == texts


def test_held_out_goes_on_where_categories_are_used_up():
  total = sum(len(v) for v in prompts.all_prompts("test").values())
  assert len(set(prompts.held_out(total))) == total
  assert prompts.held_out(0) == []
  with pytest.raises(ValueError, match=rf"only {total} test prompts \(got {total + 1}"):
    prompts.held_out(total + 1)


def test_split_names_are_checked():
  with pytest.raises(ValueError, match="'train' or 'test'"):
    prompts.all_prompts("validation")
