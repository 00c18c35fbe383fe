"""T2I-CompBench's layout and results."""

import json

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from jaxpref.errors import UserError
from jaxpref.evaluation import compbench, score_rows
from jaxpref.evaluation.prompt_sets import load_prompts


@pytest.fixture
def prompts(tmp_path):
  """Four prompts of each category, as its files have them."""
  (tmp_path / "dataset").mkdir()
  for category in compbench.JUDGES:
    lines = [f"a {category.replace('_', ' ')} {i}." for i in range(4)]
    (tmp_path / "dataset" / f"{category}_val.txt").write_text("\n".join(lines))
  return load_prompts(f"t2i-compbench:{tmp_path / 'dataset'}")


@pytest.fixture
def images(tmp_path, prompts):
  found = [[tmp_path / f"{i}-{k}.png" for k in range(3)] for i in range(len(prompts))]
  for i, files in enumerate(found):
    for k, file in enumerate(files):
      Image.new("RGB", (2, 2), (i, k, 0)).save(file)
  return found


def test_the_layout_is_what_its_programs_read(prompts, images, tmp_path):
  out = tmp_path / "out"
  for _ in range(2):
    compbench.write_layout(out, prompts, images)
  for category in compbench.JUDGES:
    names = [path.name for path in (out / category / "samples").iterdir()]
    # As BLIP_vqa.py lists, sorts and splits them.
    names.sort(key=lambda x: int(x.split("_")[-1].split(".")[0]))
    of = [i for i, p in enumerate(prompts) if p.category == category]
    assert len(names) == 3 * len(of)
    for question, name in enumerate(names):
      i, k = of[question // 3], question % 3
      assert name.split("_")[0] == prompts[i].text and name.endswith(f"_{question:06d}.png")
      assert Image.open(out / category / "samples" / name).getpixel((0, 0)) == (i, k, 0)
  with pytest.raises(UserError, match="has other files"):
    compbench.write_layout(out, prompts, [files[:2] for files in images])
  with pytest.raises(UserError, match="'a cat' is not of T2I-CompBench"):
    compbench.write_layout(out, load_prompts("a cat"), images[:1])
  with pytest.raises(UserError, match="has '_' or '/'"):
    compbench.write_layout(out, [prompts[0]._replace(text="a/b")], images[:1])


def _write_answers(out, category, answers, folder):
  file = out / category / folder / "vqa_result.json"
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(answers))
  return file


def test_results_are_rows_and_means(prompts, tmp_path, caplog):
  rng, expected = np.random.default_rng(0), {}
  for category, (_, folder) in compbench.JUDGES.items():
    if category == "complex":
      continue
    expected[category] = rng.random(12).round(4)
    answers = [
      {"question_id": i, "answer": f"{a:.4f}"} for i, a in enumerate(expected[category])
    ]
    rng.shuffle(answers)
    _write_answers(tmp_path, category, answers, folder)
  rows = compbench.read_results(tmp_path, prompts, images_per_prompt=3, model="sd")
  assert "not judged: complex" in caplog.text
  assert len(rows) == 7 * 12 and tuple(rows.columns) == score_rows.COLUMNS
  score_rows.check_rows(rows)
  found = compbench.summarize_results(rows)
  for category, values in expected.items():
    of = rows[rows["category"] == category]
    assert of["score"].tolist() == values.tolist()
    assert of["prompt"].tolist() == [
      p.text for p in prompts if p.category == category for _ in range(3)
    ]
    assert of["seed"].tolist() == [0, 1, 2] * 4
    assert found[category]["mean"] == pytest.approx(values.mean())
    means = values.reshape(4, 3).mean(axis=1)
    theirs = scipy.stats.bootstrap((means,), np.mean, method="percentile", n_resamples=20_000)
    np.testing.assert_allclose(
      found[category]["interval"], theirs.confidence_interval, atol=0.03
    )
  assert found["color"]["scorer"] == "compbench.blip_vqa"


@pytest.mark.parametrize(
  ("answers", "message"),
  [
    ({}, "has 0 answers of 0; there are 12 images"),
    ([{"question_id": 0, "answer": 1.0}] * 12, "has 1 answers of 12"),
    ([{"question_id": i} for i in range(12)], "not a list of question_id and answer"),
    ([{"question_id": i, "answer": "nan"} for i in range(12)], "answer of question 0 is nan"),
    ("x", "not a list of question_id and answer"),
  ],
)
def test_damaged_results_are_refused(answers, message, prompts, tmp_path):
  with pytest.raises(UserError, match="has no results"):
    compbench.read_results(tmp_path, prompts, images_per_prompt=3, model="sd")
  _write_answers(tmp_path, "color", answers, "annotation_blip")
  with pytest.raises(UserError, match=message):
    compbench.read_results(tmp_path, prompts, images_per_prompt=3, model="sd")
