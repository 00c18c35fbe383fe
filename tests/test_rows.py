"""Rows of every kind and source: pairs, labelled singles, ranked lists, Pick-a-Pic's files."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jaxpref import base_config
from jaxpref.data import row_set
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError
from jaxpref.shapes import annotator, builder, rankings


def _png(shade, size=(3, 2)):
  file = io.BytesIO()
  Image.new("RGB", size, (shade,) * 3).save(file, "PNG")
  return file.getvalue()


def _pair(caption, shades, label):
  return {
    "caption": caption,
    **{f"jpg_{k}": _png(shade) for k, shade in enumerate(shades)},
    "label_0": label,
    "label_1": 1 - label,
  }


PAIRS = [
  _pair("a", (10, 20), 1.0),
  _pair("b", (30, 40), 0.0),
  _pair("c", (50, 60), 0.5),  # a tie
  _pair("d", (70, 80), 0.0),
]


def _shades(row):
  return tuple(int(image[0, 0, 0]) for image in row.images)


def _data(**fields):
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 0, "num_experts": 4} | fields)
  return data


def test_pairs_are_winner_first_and_ties_are_left_out():
  found = rows_lib.from_pairs(PAIRS)
  assert [(r.caption, _shades(r)) for r in found] == [
    ("a", (10, 20)),
    ("b", (40, 30)),
    ("d", (80, 70)),
  ]
  assert len(rows_lib.from_pairs(PAIRS, 2)) == 2


def test_singles_are_images_liked_if_they_ever_won():
  # 10 wins once and loses twice; 20 loses, 30 is only in a tie, 40 wins twice.
  pairs = [
    _pair("a", (10, 20), 1.0),
    _pair("a", (10, 40), 0.0),
    _pair("a", (40, 10), 1.0),
    _pair("a", (30, 10), 0.5),
    _pair("b", (10, 40), 0.0),  # with another caption they are other rows
  ]
  found = rows_lib.to_singles(pairs)
  assert [(r.caption, *_shades(r), r.desirable) for r in found] == [
    ("a", 10, True),
    ("a", 20, False),
    ("a", 40, True),
    ("a", 30, False),
    ("b", 10, False),
    ("b", 40, True),
  ]
  assert row_set.fingerprint(found[:2]) == row_set.fingerprint(rows_lib.to_singles(pairs, 2))
  with pytest.raises(UserError, match="all images of the data are liked: the loss needs dis"):
    rows_lib.to_singles(pairs, 1)


def test_rankings_by_hand():
  row = {"prompt": b"p"}
  row |= {f"jpg_{k}": _png(s) for k, s in enumerate((10, 20, 30))}
  row |= {"rank_0": 2, "rank_1": 3, "rank_2": 1}
  (found,) = rows_lib.from_rankings([row])
  assert found.caption == "p" and _shades(found) == (30, 10, 20)


def test_the_annotator_ranks_as_plackett_and_luce():
  rng = np.random.default_rng(0)
  utilities = [2.0, 1.0, 0.0]
  orders = np.array([annotator.rank(utilities, rng) for _ in range(20_000)])
  weights = np.exp(utilities)
  first = np.bincount(orders[:, 0], minlength=3) / len(orders)
  np.testing.assert_allclose(first, weights / weights.sum(), atol=0.015)
  given = orders[orders[:, 0] == 0][:, 1]
  np.testing.assert_allclose((given == 1).mean(), weights[1] / weights[1:].sum(), atol=0.02)


def test_ranked_lists_of_the_shapes_world(tmp_path):
  config = rankings.ListsConfig(name="few", num_train=12, num_test=2, num_images=3)
  from jaxpref.runtime import tfds_store

  source = tfds_store.load(rankings.ShapesRankings, config, "train", data_dir=tmp_path)
  found = rows_lib.from_rankings(source)
  assert len(found) == 12 and all(len(r.images) == 3 for r in found)
  again = rankings.draw_list(5, 3, split="train", seed=0)
  assert again["prompt"] == found[5].caption
  best = next(k for k in range(3) if again[f"rank_{k}"] == 1)
  want = np.asarray(Image.open(io.BytesIO(again[f"jpg_{best}"])))
  np.testing.assert_array_equal(found[5].images[0], want)


def test_shapes_rows_of_every_kind(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  load = builder.load_preferences
  small = load("train", num_train=40, num_test=1, seed=1, data_dir=tmp_path)
  monkeypatch.setattr(builder, "load_preferences", lambda split: small)
  monkeypatch.setattr(rankings, "load_rankings", lambda *_: [])
  kinds = {}
  for kind in ("experts", "pairs", "singles"):
    kinds[kind] = rows_lib.load_rows(kind, _data(), image_size=32, seed=0)
    arms = rows_lib.arms_of(kind, 3)
    assert all(len(r.images) == len(arms) for r in kinds[kind])
    assert all(i.shape == (32, 32, 3) for r in kinds[kind] for i in r.images)
  assert len(kinds["experts"]) == 4
  winners = _data(experts="winners", num_experts=0)
  winners = rows_lib.load_rows("experts", winners, image_size=32, seed=0)
  assert [r.caption for r in winners] == [r.caption for r in kinds["pairs"]]
  np.testing.assert_array_equal(winners[3].images[0], kinds["pairs"][3].images[0])
  told = _data(good_prefix="+ ", bad_prefix="- ")
  for row in rows_lib.load_rows("singles", told, image_size=32, seed=0):
    assert row.prefix == ("+ " if row.desirable else "- ")
  with pytest.raises(UserError, match="pairs: data.num_rows = 99 asks for more"):
    rows_lib.load_rows("pairs", _data(num_rows=99), image_size=32, seed=0)
  with pytest.raises(UserError, match="the data has 0 lists: at least one is needed"):
    rows_lib.load_rows("lists", _data(), image_size=32, seed=0)
  with pytest.raises(UserError, match="num_experts = 81, but the data has only 80 images"):
    rows_lib.load_rows("experts", _data(num_experts=81), image_size=32, seed=0)


@pytest.mark.parametrize(
  ("wrong", "near"), [("shaeps", "shapes"), ("foldr", "folder"), ("Folder", "folder")]
)
def test_unknown_sources_name_the_nearest(wrong, near):
  with pytest.raises(UserError, match=f"'{wrong}' is unknown; did you mean '{near}'"):
    rows_lib.load_rows("experts", _data(source=wrong), image_size=64, seed=0)


def test_a_source_without_such_rows_names_one_with():
  with pytest.raises(UserError, match="folder has no lists.*; use shapes"):
    rows_lib.load_rows("lists", _data(source="folder"), image_size=64, seed=0)


# ------------------------------------------------------------------------- Pick-a-Pic


def _write(path, rows, **options):
  pd.DataFrame(rows).to_parquet(path, **options)


def test_pick_a_pic_from_parquet_files(tmp_path):
  _write(tmp_path / "b.parquet", PAIRS[2:])
  _write(tmp_path / "a.parquet", PAIRS[:2], row_group_size=1)
  data = _data(source="pickapic", path=str(tmp_path))
  found = rows_lib.load_rows("pairs", data, image_size=16, seed=0)
  assert [(r.caption, _shades(r)) for r in found] == [
    ("a", (10, 20)),
    ("b", (40, 30)),
    ("d", (80, 70)),
  ]
  assert all(i.shape == (16, 16, 3) for r in found for i in r.images)
  one = _data(source="pickapic", path=str(tmp_path / "a.parquet"), num_rows=1)
  assert len(rows_lib.load_rows("pairs", one, image_size=16, seed=0)) == 1
  with pytest.raises(UserError, match="chosen by score, but the data lacks score_0"):
    rows_lib.load_rows("experts", data, image_size=16, seed=0)


def test_pick_a_pic_with_scores_has_experts(tmp_path):
  rows = [
    row
    | {f"score_{k}": float(i - k) for k in (0, 1)}
    | {f"image_{k}_uid": f"{i}{k}" for k in (0, 1)}
    for i, row in enumerate(PAIRS)
  ]
  _write(tmp_path / "a.parquet", rows)
  data = _data(source="pickapic", path=str(tmp_path), num_experts=2)
  found = rows_lib.load_rows("experts", data, image_size=16, seed=0)
  assert [_shades(r) for r in found] == [(70,), (50,)]


def test_pick_a_pic_refuses(tmp_path):
  cases = {"": "is not a parquet file", str(tmp_path): "is not a parquet file"}
  for path, message in cases.items():
    with pytest.raises(UserError, match=message):
      rows_lib.load_rows("pairs", _data(source="pickapic", path=path), image_size=16, seed=0)
  data = _data(source="pickapic", path=str(tmp_path))
  (tmp_path / "a.parquet").write_bytes(b"nothing")
  with pytest.raises(UserError, match="cannot be read as parquet"):
    rows_lib.load_rows("pairs", data, image_size=16, seed=0)
  _write(tmp_path / "a.parquet", [{"caption": "a", "jpg_0": b""}])
  with pytest.raises(UserError, match="lacks the Pick-a-Pic columns jpg_1, label_0, label_1"):
    rows_lib.load_rows("pairs", data, image_size=16, seed=0)
  _write(tmp_path / "a.parquet", [PAIRS[0] | {"jpg_0": b"nothing"}])
  with pytest.raises(
    UserError, match=r"1 of 1 rows .* a.parquet row 0 \(not an image: begins with b'nothing'\)"
  ):
    rows_lib.load_rows("pairs", data, image_size=16, seed=0)
