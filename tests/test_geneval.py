"""GenEval's layout and results."""

import errno
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image

from jaxpref.errors import UserError
from jaxpref.evaluation import geneval, score_rows, statistics
from jaxpref.evaluation.prompt_sets import load_prompts


def _images(folder, prompts, count):
  folder.mkdir()
  found = []
  for i in range(prompts):
    found.append([folder / f"{i}-{k}.png" for k in range(count)])
    for k, file in enumerate(found[-1]):
      Image.new("RGB", (2, 2), (i, k, 0)).save(file)
  return found


def _as_geneval_reads(out):
  """Lists what GenEval's program would judge, by its own rules."""
  found = {}
  for folder in (path.name for path in out.iterdir()):
    if not (out / folder).is_dir() or not folder.isdigit():
      continue
    metadata = json.loads((out / folder / "metadata.jsonl").read_text())
    for name in (path.name for path in (out / folder / "samples").iterdir()):
      if re.match(r"\d+\.png", name):
        found[folder, name] = (
          metadata,
          Image.open(out / folder / "samples" / name).getpixel((0, 0)),
        )
  return found


@pytest.mark.parametrize("links", [True, False])
def test_the_layout_is_what_geneval_reads(links, tmp_path, monkeypatch):
  prompts = load_prompts("geneval")[180:190]  # counting has an `exclude`
  files = _images(tmp_path / "images", 10, 4)
  if not links:

    def refuse(*_):
      raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
  out = tmp_path / "out"
  for _ in range(2):  # again: an interrupted one goes on
    geneval.write_layout(out, prompts, files)
    found = _as_geneval_reads(out)
    assert found == {
      (f"{i:05d}", f"{k:04d}.png"): (prompts[i].metadata, (i, k, 0))
      for i in range(10)
      for k in range(4)
    }
    assert not list(out.rglob(".*"))
  assert (out / "00003/samples/0001.png").samefile(files[3][1]) == links
  lines = (tmp_path / "out").glob("*/metadata.jsonl")
  assert all(line.read_text().count("\n") == 1 for line in lines)


def test_what_geneval_could_not_judge_is_refused(tmp_path):
  prompts = load_prompts("geneval")[:2]
  files = _images(tmp_path / "images", 2, 3)
  with pytest.raises(UserError, match="'a cat' is not of GenEval"):
    geneval.write_layout(tmp_path / "out", load_prompts("a cat"), files[:1])
  geneval.write_layout(tmp_path / "out", prompts, files)
  with pytest.raises(UserError, match=r"has other files \(0002.png\): choose another"):
    geneval.write_layout(tmp_path / "out", prompts, [of[:2] for of in files])
  files[1][0].write_bytes(b"\xff\xd8jpeg")
  with pytest.raises(UserError, match="1-0.png is not a PNG file"):
    geneval.write_layout(tmp_path / "b", prompts, files)
  files[1][0].unlink()
  with pytest.raises(UserError, match="cannot write .*1-0.png"):
    geneval.write_layout(tmp_path / "b", prompts, files)


RATES = dict(zip(geneval.TASKS, (0.97, 0.38, 0.35, 0.76, 0.04, 0.06), strict=True))


def _results(path, seed=0, images=4, rates=RATES):
  """Writes results as GenEval's program does: by pandas, in any order."""
  rng = np.random.default_rng(seed)
  rows = []
  for i, prompt in enumerate(load_prompts("geneval")):
    # Images of a prompt are not independent.
    rate = rng.beta(rates[prompt.category], 1 - rates[prompt.category])
    for k in range(images):
      rows.append(
        {
          "filename": f"/images/{i:05d}/samples/{k:04d}.png",
          **{
            "tag": prompt.category,
            "prompt": prompt.text,
            "correct": bool(rng.random() < rate),
          },
          **{"reason": "", "metadata": json.dumps(prompt.metadata), "details": "{}"},
        }
      )
  rng.shuffle(rows)
  pd.DataFrame(rows).to_json(path, orient="records", lines=True)
  return path


def test_results_are_summed_up_as_by_geneval(tmp_path, caplog):
  path = _results(tmp_path / "results.jsonl")
  rows = geneval.read_results(path, model="sd")
  assert tuple(rows.columns) == score_rows.COLUMNS and len(rows) == 4 * 553
  found = geneval.summarize_results(rows)
  # As its summary_scores.py computes them from the file.
  frame = pd.read_json(path, orient="records", lines=True)
  tasks = frame.groupby("tag", sort=False)["correct"].mean()
  assert {task: e["share"] for task, e in found["tasks"].items()} == pytest.approx(dict(tasks))
  assert found["overall"] == pytest.approx(np.mean(list(tasks)))
  assert found["correct_images"] == pytest.approx(frame["correct"].mean())
  any_right = frame.groupby("metadata")["correct"].any().mean()
  assert found["correct_prompts"] == pytest.approx(any_right)
  assert list(found["tasks"]) == list(geneval.TASKS) and found["prompts"] == 553
  assert abs(found["overall"] - found["correct_images"]) > 0.005  # another mean
  text = geneval.to_text(found)
  assert len(text.splitlines()) == 9 and "mean of 6 tasks" in text and not caplog.messages
  json.dumps(found, allow_nan=False)


def test_intervals_are_scipys(tmp_path):
  """A bootstrap over prompts, within tasks: scipy resamples several samples independently."""
  rows = geneval.read_results(_results(tmp_path / "results.jsonl"), model="sd")
  found = geneval.summarize_results(rows)
  means = rows.groupby(["category", "prompt_id"])["score"].mean()
  samples = [means.loc[task].to_numpy() for task in geneval.TASKS]
  options = {"vectorized": True, "n_resamples": 10_000, "method": "percentile"}
  options |= {"rng": np.random.default_rng(1)}

  def overall(*of, axis=-1):
    return np.mean([x.mean(axis=axis) for x in of], axis=0)

  theirs = scipy.stats.bootstrap(samples, overall, **options).confidence_interval
  np.testing.assert_allclose(found["intervals"]["overall"], theirs, atol=2e-3)
  for task, sample in zip(geneval.TASKS, samples, strict=True):
    theirs = scipy.stats.bootstrap((sample,), np.mean, **options).confidence_interval
    np.testing.assert_allclose(found["tasks"][task]["interval"], theirs, atol=5e-3)
  # Images of a prompt are one unit: as if independent, the interval would be too narrow.
  images = rows[rows["category"] == "colors"]["score"].to_numpy()
  narrow = scipy.stats.bootstrap((images,), np.mean, **options).confidence_interval
  low, high = found["tasks"]["colors"]["interval"]
  assert high - low > 1.3 * (narrow.high - narrow.low)


def test_two_models_are_compared_by_their_results(tmp_path):
  better = {task: min(rate + 0.2, 0.99) for task, rate in RATES.items()}
  rows = pd.concat(
    geneval.read_results(_results(tmp_path / f"{m}.jsonl", seed=s, rates=r), model=m)
    for s, (m, r) in enumerate({"base": RATES, "tuned": better}.items())
  )
  entry = statistics.compare(rows, unit="mean", resamples=500)["geneval-1"]
  assert entry["prompts"] == 553 and statistics.outcome(entry) == "won" and entry["binary"]
  seeds = np.arange(4 * 553).reshape(-1, 4) + 3000
  named = geneval.read_results(tmp_path / "base.jsonl", model="base", seeds=seeds)
  assert named["seed"].tolist() == seeds.ravel().tolist()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"correct": 1}, "line 1: correct must be bool, got 1"),
    ({"tag": "colours"}, "tag must be one of single_object"),
    ({"prompt": None}, "prompt must be str, got None"),
    ({"filename": "a.png"}, "filename must end with NNNNN/samples/NNNN.png"),
    ({"filename": "x/00000/samples/0001.png"}, "judges image 1 of prompt 0 twice"),
  ],
)
def test_damaged_results_are_refused(change, message, tmp_path):
  path = tmp_path / "results.jsonl"
  line = {"filename": "x/00000/samples/0000.png", "tag": "colors", "prompt": "x"}
  line |= {"correct": True}
  other = line | {"filename": "x/00000/samples/0001.png"}
  path.write_text("".join(json.dumps(of) + "\n" for of in (line | change, other)))
  with pytest.raises(UserError, match=message):
    geneval.read_results(path, model="sd")
  for text, said in (
    ("", "holds no results"),
    ("{", "line 1 is damaged"),
    ("3", "not an object"),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=said):
      geneval.read_results(path, model="sd")


def test_fewer_images_of_a_prompt_are_a_warning(tmp_path, caplog):
  path = _results(tmp_path / "results.jsonl")
  path.write_text("\n".join(path.read_text().splitlines()[:-1]))
  assert len(geneval.read_results(path, model="sd")) == 4 * 553 - 1
  assert caplog.messages == [f"{path}: 1 prompt with fewer than 4 images"]
