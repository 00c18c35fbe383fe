"""Experts: the best images of a preference data set, and where examples come from."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxpref.data import bad_rows, rows, top_k
from jaxpref.errors import UserError
from jaxpref.shapes import annotator, builder, flaws, prompts


def _row(caption, *sides):
  row = {"caption": caption}
  for k, (uid, score, shade) in enumerate(sides):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (shade,) * 3).save(file, "PNG")
    row |= {f"image_{k}_uid": uid, f"score_{k}": score, f"jpg_{k}": file.getvalue()}
  return row


def test_top_k_by_hand():
  source = [
    _row("x", ("d", 1.0, 10), ("c", 3.0, 20)),
    _row("x", ("c", 3.0, 20), ("b", 2.0, 30)),  # c again: one expert
    _row("y", ("c", 2.0, 20), ("a", 2.0, 40)),  # c with another caption: another
    _row("x", ("e", 2.5, 30), ("f", 0.0, 50)),  # the picture of b, scored higher
  ]
  best = top_k.top_k(source, 0)
  assert [(e.source, e.caption) for e in best] == [
    ("c", "x"),
    ("e", "x"),
    ("a", "y"),
    ("c", "y"),
    ("d", "x"),
    ("f", "x"),
  ]
  assert [int(e.image[0, 0, 0]) for e in best] == [20, 30, 40, 20, 10, 50]
  assert all(e.image.dtype == np.uint8 and e.image.shape == (2, 2, 3) for e in best)
  assert [e.source for e in top_k.top_k(source, 3)] == ["c", "e", "a"]
  with pytest.raises(UserError, match="num_experts = 7, but the data has only 6 images"):
    top_k.top_k(source, 7)
  with pytest.raises(UserError, match="0 images"):
    top_k.top_k([], 1)


def test_rows_need_no_uid():
  source = [_row("x", ("", 1.0, 10), ("", 3.0, 20)), _row("y", ("", 3.0, 30), ("", 2.0, 40))]
  for row in source:
    del row["image_0_uid"], row["image_1_uid"]
  assert [int(e.image[0, 0, 0]) for e in top_k.top_k(source, 3)] == [20, 30, 40]


def test_columns_that_lack_are_named():
  with pytest.raises(UserError, match="row 0 of the data lacks the column 'label_0'"):
    rows.from_pairs([_row("x", ("a", 1.0, 10), ("b", 3.0, 20))])


def test_images_of_other_types_are_left_out():
  tally = bad_rows.Tally()
  image = {"jpg_0": Image.new("RGB", (2, 2)), "jpg_1": b"", "label_0": 1.0, "label_1": 0.0}
  assert rows.from_pairs([{"caption": "x", **image}], tally=tally) == []
  assert tally.reasons() == "1 with an image that is neither bytes nor a path"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  place = tmp_path_factory.mktemp("tfds")
  return builder.load_preferences("train", num_train=40, num_test=1, seed=1, data_dir=place)


def test_top_k_of_the_shapes_are_the_best(source):
  scores = {r[f"image_{k}_uid"].decode(): r[f"score_{k}"] for r in source for k in (0, 1)}
  best = top_k.top_k(source, 10)
  assert [e.source for e in best] == sorted(scores, key=lambda u: -scores[u])[:10]


def test_experts_are_nearly_all_without_a_flaw():
  # As many out of as many as the presets pick: 500 of 6000.
  rng = np.random.default_rng(0)
  images = []
  for _ in range(6000):
    spec = prompts.draw_prompt(rng, "train")
    befallen = flaws.draw_flaws(spec, rng)
    images.append((annotator.observed_score(annotator.utility(befallen, spec), rng), befallen))
  best = sorted(images, key=lambda image: -image[0])[:500]
  assert sum(befallen == () for _, befallen in best) >= 490
  assert sum(flaws.is_right(befallen) for _, befallen in best) == 500


def test_data_without_scores_has_no_experts():
  row = _row("x", ("a", 1.0, 10), ("b", 2.0, 20))
  del row["score_1"]
  with pytest.raises(UserError, match="the data lacks score_1"):
    top_k.top_k([row], 1)


def test_bad_images_are_replaced_by_the_next_best():
  rows = [_row("x", (f"a{i}", float(i), i), (f"b{i}", -1.0 - i, 100 + i)) for i in range(20)]
  rows[19]["jpg_0"] = b"nothing"
  rows[18]["score_0"] = float("nan")
  rows[17]["score_0"] = None
  rows[16] |= {"caption": None}
  rows[15]["jpg_0"] = None
  tally = bad_rows.Tally()
  found = top_k.top_k(rows, 3, tally=tally)
  assert [e.source for e in found] == ["a14", "a13", "a12"]
  assert tally.facts()["left_out"] == {
    "caption is null": 2,  # of both its images
    "jpg_0 is null": 1,
    "score_0 is null": 1,
    "score_0 is not finite": 1,
    "not an image": 1,
  }
