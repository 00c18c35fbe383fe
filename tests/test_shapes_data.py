"""The shapes world's preferences: the annotator and the builder."""

import io
import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxpref.errors import UserError
from jaxpref.runtime import records, tfds_store
from jaxpref.shapes import annotator, builder, flaws, prompts

PICK_A_PIC = {
  *("are_different", "best_image_uid", "caption", "created_at", "has_label"),
  *("image_0_uid", "image_0_url", "image_1_uid", "image_1_url", "jpg_0", "jpg_1"),
  *("label_0", "label_1", "model_0", "model_1", "ranking_id", "user_id"),
  "num_example_per_prompt",
}
SIZES = {"num_train": 40, "num_test": 12, "seed": 1}


# ----------------------------------------------------------------------- the flaws


def test_flaws_befall_images_at_their_rates():
  rng = np.random.default_rng(0)
  for text in ("three blue crosses", "a star left of a ring"):
    spec = prompts.parse(text)
    drawn = [flaws.draw_flaws(spec, rng) for _ in range(20_000)]
    left = 1.0  # the share of images without an earlier flaw of meaning
    for flaw in flaws.applicable(spec):
      expected = flaws.RATES[flaw] * (left if flaw in flaws.MEANING else 1.0)
      if flaw in flaws.MEANING:
        left *= 1 - flaws.RATES[flaw]
      # Five standard deviations of a binomial of 20,000, at most.
      assert abs(np.mean([flaw in f for f in drawn]) - expected) < 0.016, flaw
    assert np.mean([bool(set(f) & set(flaws.MEANING)) for f in drawn]) == pytest.approx(
      1 - left, abs=0.018
    )


# ------------------------------------------------------------------- the annotator


def test_utility_by_hand():
  one, three = prompts.parse("a red ring"), prompts.parse("three blue crosses")
  two = prompts.parse("a star left of a ring")
  cases = [
    (one, (), 2.0),
    (one, ("blur",), 2.0 - 0.9),
    (one, ("noise", "low_contrast"), 2.0 - 0.7 - 0.6),
    (one, ("swapped_color",), 0.0),
    (one, ("cropped",), -0.5),
    (two, ("swapped_relation",), 0.8 / 2),
    (three, ("wrong_count", "blur"), 0.8 * 2 / 3 - 0.9),
  ]
  for spec, befallen, expected in cases:
    assert annotator.utility(befallen, spec) == pytest.approx(expected)


def test_right_images_beat_wrong_ones_of_the_same_looks():
  for text in ("a red ring", "four blue crosses", "a star left of a ring"):
    spec = prompts.parse(text)
    for meaning in set(flaws.applicable(spec)) & set(flaws.MEANING):
      for looks in ((), ("blur",), ("noise", "low_contrast")):
        gap = annotator.utility(looks, spec) - annotator.utility((meaning, *looks), spec)
        assert gap > 1
  assert set(annotator.PENALTIES) == set(flaws.LOOKS)


def test_utility_refuses_what_cannot_be():
  with pytest.raises(ValueError, match="swapped_relation"):
    annotator.utility(("swapped_relation",), prompts.parse("a red ring"))


def _labels(gap, n=20_000):
  rng = np.random.default_rng(0)
  return np.array([annotator.prefer(0.3 + gap, 0.3, rng) for _ in range(n)])


@pytest.mark.parametrize("gap", [-2.0, -0.5, 0.3, 1.0, 3.0])
def test_preferences_follow_bradley_terry_and_slips(gap):
  labels = _labels(gap)
  assert set(labels) <= {0.0, 1.0}  # too far apart for a tie
  p = 1 / (1 + np.exp(-gap))
  p = p * (1 - annotator.SLIP_RATE) + (1 - p) * annotator.SLIP_RATE
  assert abs(labels.mean() - p) < 4 * np.sqrt(p * (1 - p) / len(labels))


def test_slips_happen_at_their_rate():
  # At this gap the worse image is preferred by none but a slip.
  wrong = (_labels(40.0) == 0).mean()
  assert abs(wrong - annotator.SLIP_RATE) < 4 * np.sqrt(0.04 * 0.96 / 20_000)


@pytest.mark.parametrize("gap", [0.0, 0.24, -0.24])
def test_close_images_are_called_a_tie_at_a_rate(gap):
  labels = _labels(gap)
  ties = (labels == 0.5).mean()
  assert abs(ties - annotator.TIE_RATE) < 4 * np.sqrt(0.25 / len(labels))
  p = 1 / (1 + np.exp(-gap))
  p += annotator.SLIP_RATE * (1 - 2 * p)
  rest = labels[labels != 0.5]
  assert abs(rest.mean() - p) < 4 * np.sqrt(0.25 / len(rest))


def test_about_an_eighth_of_the_corpus_pairs_are_ties():
  rng = np.random.default_rng(0)
  labels = []
  for _ in range(8000):
    spec = prompts.draw_prompt(rng, "train")
    pair = [annotator.utility(flaws.draw_flaws(spec, rng), spec) for _ in range(2)]
    labels.append(annotator.prefer(*pair, rng))
  assert 0.105 < np.mean(np.array(labels) == 0.5) < 0.14
  assert 0.48 < np.mean(labels) < 0.52  # no side is favoured


def test_scores_are_utilities_with_noise():
  rng = np.random.default_rng(0)
  scores = np.array([annotator.observed_score(1.3, rng) for _ in range(10_000)])
  assert abs(scores.mean() - 1.3) < 4 * 0.2 / 100
  assert abs(scores.std() - 0.2) < 4 * 0.2 / np.sqrt(2 * 10_000)


# --------------------------------------------------------------------- the builder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  place = tmp_path_factory.mktemp("tfds")
  builder.load_preferences("train", data_dir=place, **SIZES)
  return place


def _load(split, place, **sizes):
  return builder.load_preferences(split, data_dir=place, **(SIZES | sizes))


def _version_dir(place):
  return place / "shapes_preferences" / "40-12-1" / "1.0.0"


def test_columns_and_values(data_dir):
  for split, size in (("train", 40), ("test", 12)):
    rows = list(_load(split, data_dir))
    assert len(rows) == size
    assert [r["ranking_id"] for r in rows] == list(range(size))
    captions = [r["caption"].decode() for r in rows]
    assert {prompts.split_of(prompts.parse(c)) for c in captions} == {split}
    for row, text in zip(rows, captions, strict=True):
      assert set(row) == {*PICK_A_PIC, "score_0", "score_1"}
      assert row["label_0"] in (0, 0.5, 1)
      assert row["label_1"] == 1 - row["label_0"]
      best = {1: row["image_0_uid"], 0: row["image_1_uid"], 0.5: b""}[row["label_0"]]
      assert row["best_image_uid"] == best
      assert row["num_example_per_prompt"] == captions.count(text)
      assert row["has_label"] is True or row["has_label"] == np.True_
      for k in (0, 1):
        image = Image.open(io.BytesIO(row[f"jpg_{k}"]))
        assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    assert len({r[f"image_{k}_uid"] for r in rows for k in (0, 1)}) == 2 * size
    assert len({r[f"jpg_{k}"] for r in rows for k in (0, 1)}) == 2 * size


def test_rows_are_what_was_drawn(data_dir):
  rng = np.random.default_rng([1, 0x50414952, 0, 17])
  spec = prompts.draw_prompt(rng, "train")
  images, utilities, scores = [], [], []
  for _ in range(2):
    image, befallen = flaws.corpus_image(spec, rng)
    images.append(image)
    utilities.append(annotator.utility(befallen, spec))
    scores.append(annotator.observed_score(utilities[-1], rng))
  row = _load("train", data_dir)[17]
  assert row["caption"].decode() == prompts.caption(spec)
  assert row["label_0"] == annotator.prefer(*utilities, rng)
  for k in (0, 1):
    assert (np.asarray(Image.open(io.BytesIO(row[f"jpg_{k}"]))) == images[k]).all()
    assert row[f"score_{k}"] == np.float32(scores[k])


def test_rows_do_not_depend_on_how_many_there_are(data_dir, tmp_path):
  fewer = _load("train", tmp_path, num_train=5, num_test=1)
  more = _load("train", data_dir)
  for i in range(5):
    assert {**fewer[i], "num_example_per_prompt": 0} == {
      **more[i],
      "num_example_per_prompt": 0,
    }
  other = _load("train", tmp_path, num_train=5, num_test=1, seed=2)
  assert all(other[i]["jpg_0"] != more[i]["jpg_0"] for i in range(5))


def test_any_tfds_reader_reads_it(data_dir):
  read = tfds.builder_from_directory(_version_dir(data_dir))
  assert read.name == "shapes_preferences"
  assert {name: s.num_examples for name, s in read.info.splits.items()} == {
    "train": 40,
    "test": 12,
  }
  assert read.info.file_format.value == "array_record"
  last = read.as_data_source("train[-1:]")
  assert len(last) == 1
  assert last[0]["ranking_id"] == 39


def test_is_read_and_not_drawn_again(data_dir, monkeypatch):
  monkeypatch.setattr(builder, "draw_pair", None)
  assert len(_load("test", data_dir)) == 12


def test_directory_is_that_of_the_environment(data_dir, monkeypatch):
  monkeypatch.setattr(builder, "draw_pair", None)
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
  assert len(builder.load_preferences("test", **SIZES)) == 12


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
  "damage",
  [
    lambda d: next(d.glob("*train*")).unlink(),
    lambda d: _truncate(next(d.glob("*train*"))),
    lambda d: (d / "features.json").unlink(),
    lambda d: (d / "complete.json").unlink(),
    lambda d: (d / "complete.json").write_text("{"),
    lambda d: (d / "complete.json").write_text(
      (d / "complete.json").read_text().replace('"code": "', '"code": "0')
    ),
    lambda d: [p.unlink() for p in d.iterdir()],
  ],
  ids=["no shard", "short shard", "no file", "no end", "bad end", "old code", "empty"],
)
def test_a_damaged_directory_is_built_anew(tmp_path, damage):
  sizes = {"num_train": 3, "num_test": 2}
  before = list(_load("train", tmp_path, **sizes))
  (directory,) = tmp_path.glob("shapes_preferences/*/1.0.0")
  damage(directory)
  assert list(_load("train", tmp_path, **sizes)) == before
  names = sorted(p.name for p in directory.parent.iterdir())
  assert names == [".lock", "1.0.0"]


def _load_in_process(place, results):
  results.put(list(_load("train", place)))


def test_two_processes_at_once(data_dir, tmp_path):
  context = multiprocessing.get_context("spawn")
  results = context.Queue()
  processes = [
    context.Process(target=_load_in_process, args=(tmp_path, results)) for _ in range(2)
  ]
  for process in processes:
    process.start()
  first, second = results.get(timeout=60), results.get(timeout=60)
  for process in processes:
    process.join()
  assert first == second == list(_load("train", data_dir))
  names = sorted(p.name for p in _version_dir(tmp_path).parent.iterdir())
  assert names == [".lock", "1.0.0"]


def test_killed_while_it_draws(tmp_path):
  program = (
    "from jaxpref.shapes import builder;"
    f"builder.load_preferences('train', num_train=100000, data_dir={str(tmp_path)!r})"
  )
  process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
  config = tmp_path / "shapes_preferences" / "100000-300-0"
  deadline = time.monotonic() + 30
  while not list(config.glob("incomplete.*")) and time.monotonic() < deadline:
    time.sleep(0.05)
  process.kill()
  process.wait()
  assert list(config.glob("incomplete.*"))
  assert not (config / "1.0.0").exists()
  # The lock went with the process, and what it left does not stand in the way.
  config.rename(config.with_name("3-2-0"))
  rows = builder.load_preferences("train", num_train=3, num_test=2, seed=0, data_dir=tmp_path)
  assert len(rows) == 3
  assert not list(config.with_name("3-2-0").glob("incomplete.*"))


def test_progress_is_shown_and_nothing_else(tmp_path, capsys):
  _load("train", tmp_path, num_train=2, num_test=1)
  shown = capsys.readouterr()
  assert "2/2" in shown.err
  assert shown.out == ""


def test_errors_of_the_user(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write the data set shapes_preferences"):
    _load("train", tmp_path / "file")
  monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
  with pytest.raises(UserError, match="gs://bucket/tfds"):
    builder.load_preferences("train")
  with pytest.raises(ValueError, match="validation"):
    _load("validation", tmp_path)


def test_damaged_files_are_one_line_that_names_them(tmp_path):
  _load("train", tmp_path)
  directory = _version_dir(tmp_path)
  file = next(directory.glob("*-train.array_record*"))
  whole = file.read_bytes()
  where = whole.index(b"PNG") + 200  # in the pixels of some row
  file.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
  source = _load("train", tmp_path)
  with pytest.raises(UserError) as error:
    [source[i] for i in range(len(source))]
  text = str(error.value)
  assert text.startswith(f"{file} is damaged: ") and "\n" not in text
  assert text.endswith(f"; delete {directory}; its rows are then generated again")
  assert source.where(3) == f"{file.name} row 3"
  # A marker of another shape means that the data set is generated again.
  for shape in ("[]", "{}", '{"sizes": 3}', "[" * 100_000):
    (directory / "complete.json").write_text(shape)
    assert not tfds_store._is_complete(directory, builder.ShapesPreferences)
  (directory / "features.json").write_text("{")
  with pytest.raises(UserError, match=rf"{directory} is damaged: .*generated again"):
    records.Records(directory, "train", advice="it is generated again")


def test_import_is_cheap_and_tensorflow_is_not_used(tmp_path):
  program = f"""
import sys
import jaxpref.shapes, jaxpref.data.top_k
assert not {{"tensorflow_datasets", "jax", "grain"}} & set(sys.modules)
from jaxpref.shapes import builder
source = builder.load_preferences(
  "test", num_train=2, num_test=2, data_dir={str(tmp_path)!r})
print(len(source), source[1]["ranking_id"], "tensorflow" in sys.modules)
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["2", "1", "False"]
