"""`python -m jaxpref.score`: scores of data sets, and experts that are chosen by them."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import random_rows
import runs
import toy_scorers
from built_sets import built
from conftest import ROOT
from PIL import Image

from jaxpref import base_config, main
from jaxpref.data import image_scores
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError
from jaxpref.evaluate import program as evaluate_program
from jaxpref.runtime import workdir
from jaxpref.score import chunk_scoring, score_images, score_parts

SCORERS = "--scorers=toy_scorers.red,toy_scorers.length"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(score_parts, "CHUNK", 7)
  toy_scorers.CALLS.clear()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  root = tmp_path_factory.mktemp("sets")
  return {t: built("random_rows", t, root / t) for t in ("pairs", "lists", "singles")}


@pytest.fixture
def pairs(sets, tmp_path):
  return shutil.copytree(sets["pairs"], tmp_path / "set")


def _score(*flags):
  return score_images.main([SCORERS, *map(str, flags)])


def _table(out, key="toy_scorers.red-1"):
  return pd.read_parquet(out / f"{key}.parquet")


def _red(file):
  return float(np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[..., 0].mean())


def _by_hand():
  """Each image and caption of the pairs once: place, digest, caption, score."""
  found = {}
  for i, row in enumerate(random_rows.open_pairs(None, None, "all")):
    for k in (0, 1):
      file = row[f"jpg_{k}"]
      digest = hashlib.sha256(file).hexdigest()
      found.setdefault((digest, row["caption"]), (i, k, _red(file)))
  return [(i, k, *key, score) for key, (i, k, score) in found.items()]


def test_scores_of_a_built_set_by_hand(pairs, capsys):
  assert _score(f"--path={pairs}") == 0
  expected = _by_hand()
  table = _table(pairs / "scores")
  names = ["row", "arm", "image", "prompt", "score"]
  assert [tuple(row) for row in table[names].itertuples(index=False)] == expected
  assert set(table["scorer"]) == {"toy_scorers.red"} and set(table["version"]) == {"1"}
  assert table["failure"].isna().all()
  other = _table(pairs / "scores", "toy_scorers.length-2-hf")
  bad = other["prompt"].str.startswith(("caption 3", "caption 0"))
  assert bad.any() and (other["score"].isna() == bad).all()
  assert set(other["failure"][bad]) == {"a score that is not finite"}
  assert other["failure"][~bad].isna().all()
  # What is printed: statistics over the images that have a score.
  out = capsys.readouterr().out
  score = table["score"]
  line = next(line for line in out.splitlines() if line.startswith("toy_scorers.red-1 "))
  numbers = [score.mean(), score.std(), *score.quantile([0.05, 0.25, 0.5, 0.75, 0.95])]
  assert line.split()[1:] == [str(len(score)), *(f"{n:.4g}" for n in numbers), "0"]
  assert f"{bad.sum()} images without a score: {bad.sum()} a score that is not finite" in out
  assert sum(toy_scorers.CALLS) == 2 * len(expected)
  # The folder as one table, with the columns of any other program.
  assert sorted(p.name for p in (pairs / "scores").iterdir()) == [
    "toy_scorers.length-2-hf.parquet",
    "toy_scorers.red-1.parquet",
  ]
  assert len(pd.read_parquet(pairs / "scores")) == 2 * len(expected)


def _data(path, **fields):
  data = base_config.base("x", "tiny").data
  data.update({"num_rows": 0, "num_experts": 0, "path": str(path)} | fields)
  return data


def _experts(path, name="toy_scorers.red", **fields):
  data = _data(path, score=name, **fields)
  return rows_lib.load_rows("experts", data, image_size=16, seed=0)


def test_experts_are_the_best_by_a_scorer_and_another_k_scores_nothing(pairs):
  assert _score(f"--path={pairs}") == 0
  calls = list(toy_scorers.CALLS)
  best = sorted(_by_hand(), key=lambda found: -found[-1])
  table = rows_lib.load_rows("experts", _data(pairs), image_size=16, seed=0).images.table
  digests = []
  for k in (1, 3, 11, 0):
    rows = _experts(pairs, num_experts=k)
    assert len(rows) == (k or len(best))
    for row, (i, arm, _, caption, _) in zip(rows, best, strict=False):
      assert row.caption == caption
      image = Image.open(io.BytesIO(table[i][f"jpg_{arm}"])).convert("RGB")
      np.testing.assert_array_equal(row.images[0], np.asarray(image)[2:18])
    digests.append(rows.digest)
  assert len(set(digests)) == 4 and calls == toy_scorers.CALLS
  assert rows.images.table.about["experts chosen by"] == "toy_scorers.red-1"
  # By its key, by a file elsewhere, and by another scorer, which has no score for some.
  shutil.copy(pairs / "scores" / "toy_scorers.red-1.parquet", pairs.parent / "mine.parquet")
  for name in ("toy_scorers.red-1", str(pairs.parent / "mine.parquet")):
    assert _experts(pairs, name, num_experts=3).digest == digests[1]
  rows = _experts(pairs, "toy_scorers.length")
  assert {row.caption for row in rows} == {f"caption {i}\\n" for i in (1, 2, 4)}
  with pytest.raises(UserError, match=f"data.num_experts = {len(best)}, but the data has only"):
    _experts(pairs, "toy_scorers.length", num_experts=len(best))


def test_experts_of_labelled_images_are_liked_ones(sets, tmp_path):
  path = shutil.copytree(sets["singles"], tmp_path / "set")
  assert _score(f"--path={path}") == 0
  source = random_rows.open_singles(None, None, "all")
  liked = sorted((row for row in source if row["liked"]), key=lambda r: -_red(r["jpg"]))
  found = [row.caption for row in _experts(path, num_experts=5)]
  assert found == [row["caption"] for row in liked[:5]]
  with pytest.raises(UserError, match=f"the data has only {len(liked)} images"):
    _experts(path, num_experts=500)


def test_experts_of_images_are_the_best_there_are(tmp_path, monkeypatch):
  monkeypatch.setenv("LAZY_ROWS", "20")
  path = built("lazy_rows", "images", tmp_path / "set")
  assert _score(f"--path={path}") == 0
  table = _table(path / "scores")
  best = table.sort_values("score", ascending=False, kind="stable")["prompt"].tolist()
  assert [row.caption for row in _experts(path, num_experts=4)] == best[:4]
  assert [row.caption for row in _experts(path, num_experts=500)] == best


@pytest.mark.long
def test_a_run_marks_the_scorer_that_chose_its_experts(tiny_pipeline, tmp_path, monkeypatch):
  monkeypatch.setenv("LAZY_ROWS", "20")
  path = built("lazy_rows", "images", tmp_path / "set")
  assert _score(f"--path={path}") == 0
  fields = {"data.path": path, "data.score": "toy_scorers.red", "data.num_experts": 8}
  fields["evaluate.scorers"] = "('toy_scorers.red', 'toy_scorers.length')"
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "run", "sft", **fields)) == 0
  results = json.loads((tmp_path / "run/evaluation/4/results.json").read_text())
  marked = {key: entry["selected_training_data"] for key, entry in results.items()}
  assert marked == {"toy_scorers.red-1": True, "toy_scorers.length-2-hf": False}
  page = (tmp_path / "run/report.html").read_text()
  assert "experts chosen by" in page and "8 experts" in page
  # A comparison of models reads it from the run.
  flags = [f"--models=base={tiny_pipeline},run={tmp_path / 'run'}", "--prompts=a ring"]
  flags += ["--scorers=toy_scorers.red,toy_scorers.length", "--steps=2", "--resamples=50"]
  assert evaluate_program.main([*flags, f"--out={tmp_path / 'compared'}"]) == 0
  (pair,) = json.loads((tmp_path / "compared/results.json").read_text())["comparisons"]
  marked = {key: one["selected_training_data"] for key, one in pair["scorers"].items()}
  assert marked == {"toy_scorers.red-1": True, "toy_scorers.length-2-hf": False}


def test_lists_are_scored(sets, tmp_path):
  path = shutil.copytree(sets["lists"], tmp_path / "set")
  assert _score(f"--path={path}", "--batch-size=3") == 0
  table = _table(path / "scores")
  source = random_rows.open_lists(None, None, "all")
  assert len(table) == 5 * len(source)  # no image is twice in a list, and no prompt in two
  for row in table.itertuples():
    assert row.prompt == source[row.row]["prompt"]
    assert row.score == _red(source[row.row][f"jpg_{row.arm}"])


def _files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(sets, tmp_path_factory):
  """The files of an undisturbed run."""
  out = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(score_parts, "CHUNK", 7)
    assert _score(f"--path={sets['pairs']}", f"--out={out}") == 0
  return _files(out)


class _Stop(BaseException):
  """The end of a process."""


@pytest.mark.parametrize("seed", range(8))
def test_interrupted_anywhere_it_ends_with_the_same_files(
  seed, sets, whole, tmp_path, monkeypatch
):
  """Stopped again and again, at random calls of what reads, scores and writes."""
  rng = random.Random(seed)
  left = [0]

  def interrupted(function):
    def wrapped(*args, **kwargs):
      left[0] -= 1
      if left[0] == 0:
        raise _Stop
      return function(*args, **kwargs)

    return wrapped

  places = (
    *((score_parts, "write_part"), (score_parts, "merge"), (workdir, "write_bytes")),
    *((chunk_scoring, "score_batch"), (score_parts, "_read_part"), (shutil, "rmtree")),
  )
  stops = 0
  for _ in range(60):
    left[0] = rng.randrange(1, 40)
    with monkeypatch.context() as patch:
      for module, name in places:
        patch.setattr(module, name, interrupted(getattr(module, name)))
      try:
        done = _score(f"--path={sets['pairs']}", f"--out={tmp_path}", "--batch-size=4")
      except _Stop:
        stops += 1
        continue
    assert done == 0
    break
  assert stops > 1
  assert _files(tmp_path) == whole


@pytest.mark.parametrize("total", [1, 2, 4])
def test_shards_give_the_same_table(total, sets, whole, tmp_path, capsys):
  scored = []
  for number in reversed(range(total)):
    flags = (f"--path={sets['pairs']}", f"--out={tmp_path}", f"--shard={number}/{total}")
    toy_scorers.CALLS.clear()
    assert _score(*flags) == 0
    scored.append(sum(toy_scorers.CALLS))
    said = capsys.readouterr().out
    assert ("is finished, others are not" in said) == (number > 0)
  assert _files(tmp_path) == whole and min(scored) > 0
  assert sum(scored) == 2 * len(_by_hand())


def test_a_launcher_gives_each_process_its_share(sets, whole, tmp_path, monkeypatch):
  monkeypatch.setenv("SLURM_STEP_NODELIST", "here")
  monkeypatch.setenv("SLURM_NTASKS", "3")
  for rank in ("1", "0", "2"):
    monkeypatch.setenv("SLURM_PROCID", rank)
    assert _score(f"--path={sets['pairs']}", f"--out={tmp_path}") == 0
  assert _files(tmp_path) == whole


def test_only_what_is_missing_is_scored(sets, whole, tmp_path):
  flags = (f"--path={sets['pairs']}", f"--out={tmp_path}")
  assert score_images.main(["--scorers=toy_scorers.length", *flags]) == 0
  once = sum(toy_scorers.CALLS)
  assert _score(*flags) == 0
  assert sum(toy_scorers.CALLS) == 2 * once  # the other scorer alone
  assert _score(*flags) == 0
  assert sum(toy_scorers.CALLS) == 2 * once
  assert _files(tmp_path) == whole


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_batch_size_changes_nothing(size, sets, whole, tmp_path):
  assert _score(f"--path={sets['pairs']}", f"--out={tmp_path}", f"--batch-size={size}") == 0
  assert max(toy_scorers.CALLS) == min(size, 7)
  assert _files(tmp_path) == whole


def _write_folder(folder, count=6):
  folder.mkdir()
  for i in range(count):
    pixels = np.random.default_rng(i).integers(0, 256, (10 + i, 20 - i, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / f"{i}.txt").write_text(f"caption {i}")
  (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
  (folder / "4.txt").write_bytes(b"\xff")


def test_a_folder_of_any_sizes_with_files_that_cannot_be_read(tmp_path, capsys):
  _write_folder(tmp_path / "images")
  flags = ("--source=folder", f"--path={tmp_path / 'images'}", f"--out={tmp_path / 'out'}")
  assert _score(*flags) == 0
  table = _table(tmp_path / "out")
  assert table["prompt"].tolist() == [f"caption {i}" if i != 4 else "" for i in range(6)]
  reasons = {1: "damaged image", 4: "caption is not UTF-8"}
  for i, row in enumerate(table.itertuples()):
    if i in reasons:
      assert np.isnan(row.score) and row.failure == reasons[i]
    else:
      content = (tmp_path / "images" / f"{i}.png").read_bytes()
      assert row.image == hashlib.sha256(content).hexdigest() and row.score == _red(content)
  assert "2 images without a score" in capsys.readouterr().out
  # The folder has changed: these are not its scores.
  (tmp_path / "images" / "7.png").write_bytes(content)
  (tmp_path / "images" / "7.txt").write_text("new")
  assert _score(*flags) == 2
  assert "holds scores of another data set (6 images" in capsys.readouterr().err


def test_scores_of_another_set_are_refused(pairs, sets, tmp_path, capsys):
  other = shutil.copytree(sets["singles"], tmp_path / "other")
  assert _score(f"--path={pairs}") == 0
  shutil.copytree(pairs / "scores", other / "scores")
  with pytest.raises(UserError, match="toy_scorers.red-1.parquet holds scores of another data"):
    _experts(other)
  assert _score(f"--path={other}") == 2
  # Also if only parts are there.
  shutil.rmtree(other / "scores")
  assert _score(f"--path={pairs}", f"--out={tmp_path / 'o'}", "--shard=0/2") == 0
  assert _score(f"--path={other}", f"--out={tmp_path / 'o'}") == 2
  err = capsys.readouterr().err
  assert err.count("holds scores of another data set") == 2 and "delete it, and score" in err


def test_damaged_scores_are_refused(pairs):
  assert _score(f"--path={pairs}") == 0
  file = pairs / "scores" / "toy_scorers.red-1.parquet"
  good = file.read_bytes()
  file.write_bytes(good[: len(good) // 2])
  with pytest.raises(UserError, match="is damaged, or not a file of `python -m jaxpref.score`"):
    _experts(pairs)
  pd.DataFrame({"score": [1.0]}).to_parquet(file)
  with pytest.raises(UserError, match="is damaged, or not a file of `python -m jaxpref.score`"):
    _experts(pairs)
  file.write_bytes(good)
  table = pq.read_table(file)
  pq.write_table(table.slice(1), file)
  with pytest.raises(UserError, match=f"it has {len(table) - 1} rows, not {len(table)}"):
    _experts(pairs)


def test_which_scores(pairs):
  with pytest.raises(
    UserError, match=r"has no scores of 'toy_scorers.red' \(there are: none\)"
  ):
    _experts(pairs)
  assert _score(f"--path={pairs}") == 0
  with pytest.raises(UserError, match="there are: toy_scorers.length-2-hf, toy_scorers.red-1"):
    _experts(pairs, "toy_scorers.read")
  with pytest.raises(UserError, match="no.parquet is not a file"):
    _experts(pairs, "no.parquet")
  scores = pairs / "scores"
  shutil.copy(scores / "toy_scorers.red-1.parquet", scores / "toy_scorers.red-2.parquet")
  with pytest.raises(UserError, match="several versions: toy_scorers.red-1, toy_scorers.red-2"):
    _experts(pairs)
  needs = "chooses experts: it needs a loss that learns from experts"
  for kind, fields in (
    ("pairs", {}),
    ("singles", {}),
    ("experts", {"experts": "winners"}),
    ("experts", {"source": "random_rows", "path": ""}),
  ):
    data = _data(**{"path": pairs} | fields, score="toy_scorers.red-1")
    with pytest.raises(UserError, match=needs):
      rows_lib.load_rows(kind, data, image_size=16, seed=0)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "required: --scorers"),
    (["--scorers=toy_scorers.blue"], "unknown scorer 'toy_scorers.blue'"),
    (["--scorers=toy_scorers.slash"], "must be letters, digits and .+-_: 'toy_scorers.slash-1"),
    (["--scorers=toy_scorers.wrong"], "must return one number for each of 7 images"),
    ([SCORERS, "--source=folder"], "leave out --source=folder"),
    ([SCORERS, "--path=nowhere"], "--path=nowhere is not a built data set; name what its"),
    ([SCORERS, "--path=nowhere", "--source=folder"], "--out is missing"),
    (
      [SCORERS, "--path=x", "--source=foldr"],
      "--source 'foldr' is unknown; did you mean 'folder'",
    ),
    ([SCORERS, "--path=", "--source=folder", "--out=x"], "--source=folder needs --path"),
    ([SCORERS, "--path=nowhere", "--source=folder", "--out=x"], "'nowhere' is not a folder"),
    ([SCORERS, "--source=mjhq", "--table=pairs", "--path=x", "--out=x"], "not pairs"),
    ([SCORERS, "--source=prompts", "--path={}/p.txt", "--out=x"], "has only captions"),
    ([SCORERS, "--batch-size=0"], "must be at least 1"),
    ([SCORERS, "--shard=2/2"], "must be I/N with I from 0 to N-1"),
    ([SCORERS, "--shard=1"], "must be I/N with I from 0 to N-1"),
  ],
)
def test_commands_that_cannot_be(flags, message, sets, tmp_path, capsys):
  (tmp_path / "p.txt").write_text("a cat\n")
  before = _files(sets["pairs"])
  given = [flag.format(tmp_path) for flag in flags]
  out = [f"--path={sets['pairs']}", f"--out={tmp_path / 'out'}"]
  assert score_images.main([*(out if "--path" not in " ".join(given) else []), *given]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("error: ") == 1
  assert _files(sets["pairs"]) == before and not list((tmp_path / "out").rglob("*.parquet"))


class _Numbers:
  """An index of pairs of a million rows, whose images are shared by rows."""

  captions = range(50_000)

  def __len__(self):
    return 1_000_000

  def image_names(self):
    return ["image_0", "image_1"]

  def gather(self, names, rows):
    of = np.random.default_rng(0)
    images = of.integers(0, 1_200_000, (len(rows), 2), np.int32)
    return np.concatenate([images, of.integers(0, 50_000, (len(rows), 1), np.int32)], axis=1)


def test_places_of_a_million_pairs():
  places = image_scores.places_of(_Numbers())
  found = _Numbers().gather([], range(1_000_000))
  np.testing.assert_array_equal(found[places.row, places.arm], places.image)
  np.testing.assert_array_equal(found[places.row, 2], places.caption)
  order = 2 * places.row + places.arm
  assert (np.diff(order) > 0).all()
  first = {}
  for i, (a, b, caption) in enumerate(found[:2000].tolist()):
    for k, image in enumerate((a, b)):
      first.setdefault((image, caption), 2 * i + k)
  assert order[order < 4000].tolist() == sorted(first.values())


@pytest.mark.long
def test_killed_at_random_it_ends_with_the_same_files(sets, tmp_path):
  command = [
    *(sys.executable, "-m", "jaxpref.score", "--scorers=toy_scorers.red", "--batch-size=16"),
    *("--source=lazy_rows", f"--out={tmp_path / 'out'}"),
  ]
  env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "LAZY_ROWS": "9000"}
  whole = [*command[:-1], f"--out={tmp_path / 'whole'}"]
  subprocess.run(whole, env=env, check=True, capture_output=True)
  out, rng, killed = tmp_path / "out", random.Random(0), 0
  for done in range(1, 9, 2):  # after parts have been written
    first = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    while first.poll() is None and len(list(out.rglob("0*.parquet"))) < done:
      time.sleep(0.001)
    time.sleep(rng.random() / 20)
    if first.poll() is None:
      first.send_signal(signal.SIGKILL)
      killed += 1
    first.wait()
  subprocess.run(command, env=env, check=True, capture_output=True)
  assert killed > 1
  assert _files(out) == _files(tmp_path / "whole")


_MEASURE = """
import re, sys
from jaxpref.score import score_images
assert score_images.main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in /proc")
def test_memory_does_not_grow_with_the_images(tmp_path):
  peaks = []
  for count in (4_000, 40_000):
    command = [
      *(sys.executable, "-c", _MEASURE, "--scorers=toy_scorers.red", "--source=lazy_rows"),
      f"--out={tmp_path / str(count)}",
    ]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = os.environ | {"PYTHONPATH": paths, "LAZY_ROWS": str(count)}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    peaks.append(int(done.stdout.split()[-1]))
  assert peaks[1] < 1.05 * peaks[0], peaks
