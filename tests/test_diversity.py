"""Diversity by model and prompt, and the warnings of reward hacking."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_comparisons import table

from jaxpref import config
from jaxpref.evaluation import (
  comparison_text,
  comparisons,
  diversity,
  evaluate,
  reward_hacking,
  score_rows,
  statistics,
  vendi,
)
from jaxpref.runtime import workdir

PROMPTS, ALIKE = 20, 4


def images_of(models=("base", "dro"), texts=None):
  return pd.DataFrame(
    [
      (model, p, 10 * p + s, texts[p] if texts else f"prompt {p}", "c")
      for model in models
      for p in range(PROMPTS)
      for s in range(ALIKE)
    ],
    columns=["model", "prompt_id", "seed", "prompt", "category"],
  )


def features_of(spreads, seed=0):
  """Features of images that lie about a direction of their prompt, [models x images, 6]."""
  rng = np.random.default_rng(seed)
  centre = rng.normal(size=(PROMPTS, 1, 6))
  parts = [centre + spread * rng.normal(size=(PROMPTS, ALIKE, 6)) for spread in spreads]
  return np.concatenate([part.reshape(-1, 6) for part in parts])


def test_by_prompt_and_overall():
  features = features_of([1.0, 0.3])
  found = diversity.compare_diversity(features, images_of(), name="clip", baseline="base")
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  of = features.reshape(2, PROMPTS, ALIKE, 6)
  scores = np.array([[vendi.vendi_score(x) for x in model] for model in of])
  [one] = found["by_prompt"]["comparisons"]
  entry = one["scorers"]["vendi.clip-1"]
  assert entry["p_value"] == pytest.approx(scipy.stats.ttest_rel(*scores).pvalue)
  assert entry["difference"] == pytest.approx(scores[1].mean() - scores[0].mean())
  assert entry["difference"] < 0
  summary = found["by_prompt"]["models"]["dro"]
  assert summary["vendi.clip-1"]["mean"] == pytest.approx(scores[1].mean())
  distances = [vendi.mean_distance(x) for x in of[1]]
  assert summary["distance.clip-1"]["mean"] == pytest.approx(np.mean(distances))
  assert found["overall"]["base"] == {
    "vendi": vendi.vendi_score(of[0].reshape(-1, 6)),
    "distance": vendi.mean_distance(of[0].reshape(-1, 6)),
    "images": PROMPTS * ALIKE,
  }
  text = comparison_text.diversity_text(found)
  assert text.startswith("Diversity by clip\nmodel")
  line = text.splitlines()[-1].split()
  assert line[0] == "dro" and line[3] == f"{scores[1].mean():.3f}"
  assert float(line[5]) == pytest.approx(entry["difference"], abs=1e-3)


def test_the_order_of_images_does_not_matter():
  features, images = features_of([1.0, 0.3]), images_of()
  order = np.random.default_rng(1).permutation(len(images))
  order = np.concatenate([[0], order[order != 0]])  # the baseline is named first
  found, again = (
    diversity.compare_diversity(f, i, name="x", baseline="base")["by_prompt"]["models"]
    for f, i in ((features, images), (features[order], images.iloc[order]))
  )
  for model in ("base", "dro"):
    for key, summary in found[model].items():
      assert again[model][key] == pytest.approx(summary)


def test_one_image_of_a_prompt_has_no_diversity():
  images = images_of()
  first = (images["seed"] % 10 == 0).to_numpy()
  found = diversity.compare_diversity(
    features_of([1, 1])[first], images[first], name="x", baseline="base"
  )
  assert found["by_prompt"] is None and found["overall"]["dro"]["images"] == PROMPTS
  size = found["overall"]["dro"]
  assert comparison_text.diversity_rows(found)[::2] == [
    ("model", "Vendi", "distance"),
    ("dro", f"{size['vendi']:.3f}", f"{size['distance']:.3f}"),
  ]


def test_prompts_of_one_text_are_measured_together():
  texts = ["same" if p < 3 else f"prompt {p}" for p in range(PROMPTS)]
  features = features_of([1.0, 1.0])
  rows = diversity.prompt_rows(features, images_of(texts=texts), name="x")
  assert len(rows) == 2 * 2 * (PROMPTS - 2)
  [score] = rows[(rows["prompt"] == "same") & (rows["scorer"] == "vendi.x")]["score"][:1]
  assert score == pytest.approx(vendi.vendi_score(features[: 3 * ALIKE]))


def test_what_cannot_be_compared_is_refused():
  features, images = features_of([1.0, 1.0]), images_of()
  with pytest.raises(ValueError, match=r"of prompt 19 .got base 4, dro 3"):
    diversity.prompt_rows(features[:-1], images[:-1], name="x")
  with pytest.raises(ValueError, match="160 images have 159 rows of features"):
    diversity.prompt_rows(features[:-1], images, name="x")
  with pytest.raises(ValueError, match="images lack the columns category"):
    diversity.prompt_rows(features, images.drop(columns="category"), name="x")
  with pytest.raises(ValueError, match="model base, prompt 0, seed 0 occurs twice"):
    diversity.prompt_rows(features, images.assign(seed=0), name="x")


def test_pixels():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(3, 48, 40, 3), dtype=np.uint8)
  features = diversity.pixel_features(images)
  assert features.shape == (3, 32 * 32 * 3 + 1)
  whole = rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
  np.testing.assert_array_equal(diversity.pixel_features([whole])[0, :-1], whole.ravel())
  black = np.zeros((16, 16, 3), np.uint8)
  assert vendi.vendi_score(diversity.pixel_features([black, black])) == pytest.approx(1)
  assert vendi.vendi_score(diversity.pixel_features([black, black + 9])) == pytest.approx(2)


def hacked(*, chosen, held_out, spread):
  """Scores and diversity of a model against its base, which is better by these differences."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(PROMPTS, ALIKE))
  parts = [
    table({"base": base, "dro": base + up + 0.1 * rng.normal(size=base.shape)}, scorer=name)
    for name, up in (("chosen", chosen), ("clip", held_out))
  ]
  found = comparisons.compare_all(pd.concat(parts), baseline="base", selected_by=["chosen"])
  measured = diversity.compare_diversity(
    features_of([1.0, spread]), images_of(), name="pixels", baseline="base"
  )
  return found, [measured]


def test_a_rise_that_others_contradict_is_warned_of():
  [said] = reward_hacking.find_hacking(*hacked(chosen=0.5, held_out=-0.5, spread=0.2))
  assert said.startswith("dro against base: chosen-1 (+0.")
  assert "which had a part in the training, rises, but clip-1 (-0." in said
  assert " and vendi.pixels-1 (-" in said and "distance" not in said
  found, _ = hacked(chosen=0.5, held_out=-0.5, spread=0.2)
  [said] = reward_hacking.find_hacking(found, role="is trained on")
  assert "which is trained on, rises, but clip-1 (-0." in said and "vendi" not in said
  [said] = reward_hacking.find_hacking(*hacked(chosen=0.5, held_out=0.0, spread=0.2))
  assert "clip-1" not in said and "vendi.pixels-1" in said and ") falls:" in said


@pytest.mark.parametrize(
  "changes",
  [
    {"chosen": 0.5, "held_out": 0.5, "spread": 1.0},  # all rise
    {"chosen": 0.0, "held_out": -0.5, "spread": 0.2},  # the selecting scorer does not
    {"chosen": -0.5, "held_out": -0.5, "spread": 0.2},
    {"chosen": 0.5, "held_out": 0.0, "spread": 1.0},  # nothing falls significantly
  ],
)
def test_no_warning_without_contradiction(changes):
  assert reward_hacking.find_hacking(*hacked(**changes)) == []


def test_a_run_is_warned_of_by_what_selected_its_data_or_what_it_is_trained_on():
  found, measured = hacked(chosen=0.5, held_out=-0.5, spread=0.2)
  [one] = found["comparisons"]
  [said] = reward_hacking.find_in_run(one["scorers"], [])
  assert said.startswith("tuned against base: chosen-1 (+0.")
  assert "which had a part in the training, rises, but clip-1 (-0." in said
  one["scorers"]["chosen-1"]["selected_training_data"] = False
  assert reward_hacking.find_in_run(one["scorers"], []) == []
  [said] = reward_hacking.find_in_run(one["scorers"], [], trained=["chosen"])
  assert "which is trained on, rises, but clip-1 (-0." in said
  versions = {f"{key}-hf": entry for key, entry in one["scorers"].items()}
  [said] = reward_hacking.find_in_run(versions, [], trained=["chosen"])
  assert "which is trained on, rises, but clip-1-hf (-0." in said
  for one in measured[0]["by_prompt"]["comparisons"]:
    one["model"] = "tuned"
  [said] = reward_hacking.find_in_run(
    found["comparisons"][0]["scorers"], measured, trained=["chosen"]
  )
  assert "vendi.pixels-1 (-" in said


@pytest.mark.parametrize("trained", [(), ("chosen",)])
def test_the_report_of_a_run_has_diversity_and_the_warning(tmp_path, capsys, trained):
  """Of an evaluation whose first scorer chose the data, or is what the run is trained on."""
  rng = np.random.default_rng(0)
  base = rng.normal(size=(PROMPTS, ALIKE))
  rows = [
    table({"base": base, "tuned": base + up + 0.1 * rng.normal(size=base.shape)}, scorer=name)
    for name, up in (("chosen", 0.5), ("clip", 0.0))
  ]
  results = statistics.compare(pd.concat(rows), selected_by=() if trained else ["chosen"])
  statistics.write_results(tmp_path / "results.json", results)
  score_rows.write_rows(tmp_path / "scores.parquet", pd.concat(rows))
  workdir.write_json(tmp_path / "examples.json", [])
  found = diversity.compare_diversity(
    features_of([1.0, 0.2]), images_of(("base", "tuned")), name="pixels", baseline="base"
  )
  workdir.write_json(tmp_path / "diversity.json", found)
  report = evaluate.write_report(
    *(tmp_path, tmp_path, config.load_config("dro:tiny"), {}), held_out=True, trained=trained
  )
  printed, page = capsys.readouterr().out, report.read_text()
  role = "is trained on" if trained else "had a part in the training"
  assert (
    f"which {role}, rises, but vendi.pixels-1 (-" in printed and f"which {role}, rises" in page
  )
  assert comparison_text.diversity_text(found) in printed
  assert f"{found['overall']['tuned']['vendi']:.3f}" in page


def test_results_of_diversity_are_told_from_other_values():
  found = diversity.compare_diversity(
    features_of([1, 1]), images_of(), name="x", baseline="base"
  )
  assert diversity.is_diversity(found) and diversity.is_diversity(found | {"by_prompt": None})
  assert not any(diversity.is_diversity(value) for value in (None, [], {}, {"features": "x"}))
  assert not diversity.is_diversity(found | {"features": "y"})
  assert not diversity.is_diversity(found | {"overall": {"base": {"vendi": "2"}}})
  del found["by_prompt"]["comparisons"][0]["scorers"]["vendi.x-1"]["holm"]
  assert not diversity.is_diversity(found)


def test_no_warning_without_a_selecting_scorer():
  found, measured = hacked(chosen=0.5, held_out=-0.5, spread=0.2)
  for one in found["comparisons"]:
    one["scorers"]["chosen-1"]["selected_training_data"] = False
  assert reward_hacking.find_hacking(found, measured) == []
