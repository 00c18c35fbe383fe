"""Comparisons of several models: units, missing scores, repeated prompts, training runs."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from jaxpref.evaluation import comparison_text, comparisons, score_rows, statistics


def table(scores, *, scorer="quality", version="1", texts=None):
  """Rows of each model from arrays of scores [prompts, seeds]."""
  rows = [
    (model, p, 10 * p + s, texts[p] if texts else f"prompt {p}", "c", scorer, version, score)
    for model, of in scores.items()
    for (p, s), score in np.ndenumerate(np.asarray(of, np.float64))
  ]
  return pd.DataFrame(rows, columns=list(score_rows.COLUMNS))


def random_scores(models, *, prompts=30, seeds=5, shift=0.3, seed=0):
  rng = np.random.default_rng(seed)
  common = rng.normal(size=(prompts, 1))
  return {
    name: common + i * shift + rng.normal(size=(prompts, seeds))
    for i, name in enumerate(models)
  }


def test_mean_of_a_prompt():
  scores = random_scores(["base", "tuned"])
  entry = statistics.compare(table(scores), unit="mean")["quality-1"]
  base, tuned = (of.mean(1) for of in scores.values())
  assert entry["unit"] == "mean" and entry["prompts"] == 30
  assert entry["win"] == (tuned > base).mean()
  assert entry["base"] == {
    "mean": pytest.approx(base.mean()),
    "n": 30,
    "std": pytest.approx(base.std(ddof=1)),
  }
  assert entry["p_value"] == pytest.approx(scipy.stats.ttest_rel(tuned, base).pvalue)


def test_single_is_the_first_image():
  scores = random_scores(["base", "tuned"])
  rows = table(scores).sample(frac=1, random_state=0)
  entry = statistics.compare(rows, unit="single")["quality-1"]
  first = {name: of[:, :1] for name, of in scores.items()}
  expected = statistics.compare(table(first))["quality-1"]
  assert entry == expected | {"unit": "single"}


def test_all_scorers_judge_the_image_of_median_score():
  scores = random_scores(["base", "tuned"])
  other = random_scores(["base", "tuned"], seed=1)
  rows = pd.concat([table(scores), table(other, scorer="clip")])
  entries = statistics.compare(rows, unit="median:quality")
  assert entries["clip-1"]["unit"] == "median:quality"
  of = {}
  for model, by_prompt in scores.items():
    middle = np.argsort(by_prompt, axis=1)[:, 2]
    np.testing.assert_array_equal(
      np.take_along_axis(by_prompt, middle[:, None], 1)[:, 0], np.median(by_prompt, axis=1)
    )
    of[model] = np.take_along_axis(other[model], middle[:, None], 1)
  expected = statistics.compare(table(of, scorer="clip"), unit="single")["clip-1"]
  # The family has another size.
  assert entries["clip-1"] | {"holm": 0} == expected | {"unit": "median:quality", "holm": 0}
  medians = {
    model: np.median(by_prompt, axis=1)[:, None] for model, by_prompt in scores.items()
  }
  expected = statistics.compare(table(medians))["quality-1"]
  assert entries["quality-1"]["difference"] == pytest.approx(expected["difference"])
  assert entries["quality-1"]["win"] == expected["win"]
  by_key = statistics.compare(rows, unit="median:quality-1")
  assert by_key["clip-1"]["win"] == entries["clip-1"]["win"]


def test_the_median_of_an_even_number_is_the_lower_one():
  rows = table({"base": [[3, 1, 2, 4]], "tuned": [[0, 0, 0, 0]]})
  assert statistics.compare(rows, unit="median:quality")["quality-1"]["base"]["mean"] == 2


@pytest.mark.parametrize("unit", ["median", "median:other", "prompt", "median:"])
def test_unknown_units_are_refused(unit):
  with pytest.raises(ValueError, match=unit):
    statistics.compare(table(random_scores(["base", "tuned"])), unit=unit)


def test_two_versions_do_not_choose_the_median():
  rows = table(random_scores(["base", "tuned"]))
  rows = pd.concat([rows, rows.assign(version="2")])
  with pytest.raises(ValueError, match="must be one of quality-1, quality-2"):
    statistics.compare(rows, unit="median:quality")


def test_prompts_of_one_text_are_one_unit():
  scores = random_scores(["base", "tuned"], prompts=6, seeds=2)
  texts = ["a", "b", "a", "c", "b", "a"]
  entry = statistics.compare(table(scores, texts=texts), unit="mean")["quality-1"]
  base, tuned = (
    np.array([of[[0, 2, 5]].mean(), of[[1, 4]].mean(), of[3].mean()]) for of in scores.values()
  )
  assert entry["prompts"] == 3 and entry["merged_prompts"] == 3
  assert entry["p_value"] == pytest.approx(scipy.stats.ttest_rel(tuned, base).pvalue)
  entry = statistics.compare(table(scores, texts=texts))["quality-1"]
  assert entry["prompts"] == 3 and entry["base"]["n"] == 12
  assert entry["p_value"] == pytest.approx(scipy.stats.ttest_rel(tuned, base).pvalue)
  first = statistics.compare(table(scores, texts=texts), unit="single")["quality-1"]
  assert first["base"]["mean"] == pytest.approx(scores["base"][[0, 1, 3], 0].mean())


def test_a_prompt_has_one_text():
  rows = table(random_scores(["base", "tuned"], prompts=3))
  rows.loc[rows.index[-1], "prompt"] = "other"
  with pytest.raises(ValueError, match="prompt 2 has two texts: 'prompt 2' and 'other'"):
    statistics.compare(rows)


@pytest.mark.parametrize("unit", ["image", "mean"])
def test_missing_scores_of_imported_scorers_are_left_out_on_both_sides(unit):
  scores = random_scores(["base", "tuned"], prompts=8, seeds=2)
  rows = table(scores, scorer="judge")
  nan = (rows["model"] == "tuned") & (rows["prompt_id"] == 3)  # both images
  absent = (rows["model"] == "base") & (rows["seed"] == 50)  # one of two
  gaps = rows.assign(score=rows["score"].mask(nan))[~absent]
  entry = statistics.compare(gaps, unit=unit, imported=["judge"])["judge-1"]
  kept = ~rows["seed"].isin([30, 31, 50])
  expected = statistics.compare(rows[kept], unit=unit)["judge-1"]
  assert entry == expected | {"dropped": 3} and entry["prompts"] == 7
  with pytest.raises(ValueError, match="judge-1 for model tuned, prompt 3, seed 30"):
    statistics.compare(gaps)
  with pytest.raises(ValueError, match="prompt 5, seed 50 has no base score"):
    statistics.compare(rows[~absent])
  with pytest.raises(ValueError, match="must be finite .got inf"):
    statistics.compare(rows.assign(score=np.inf), imported=["judge"])
  none = rows.assign(score=rows["score"].mask(rows["model"] == "base"))
  assert statistics.compare(none, imported=["judge-1"]) == {}


def test_missing_scores_of_median_images_are_left_out():
  scores = random_scores(["base", "tuned"], prompts=8, seeds=3)
  own = table(scores)
  middle = {m: np.argsort(of, axis=1)[:, 1] for m, of in scores.items()}
  judged = table(random_scores(["base", "tuned"], prompts=8, seeds=3, seed=1), scorer="judge")
  seen = (judged["model"] == "base") & (judged["seed"] == 10 + middle["base"][1])
  unseen = (judged["model"] == "base") & (judged["seed"] == 20 + (middle["base"][2] + 1) % 3)
  rows = pd.concat([own, judged.assign(score=judged["score"].mask(seen | unseen))])
  entries = statistics.compare(rows, unit="median:quality", imported=["judge"])
  assert (entries["judge-1"]["prompts"], entries["judge-1"]["dropped"]) == (7, 1)
  assert (entries["quality-1"]["prompts"], entries["quality-1"]["dropped"]) == (8, 0)


def test_every_pair_of_models_is_compared():
  models = ["base", "dro", "dpo"]
  rows = pd.concat([table(random_scores(models, seed=i), scorer=s) for i, s in enumerate("ab")])
  found = comparisons.compare_all(rows, baseline="base", selected_by=["a"], unit="image")
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  assert comparisons.are_comparisons(found)
  assert [(one["baseline"], one["model"]) for one in found["comparisons"]] == [
    ("base", "dro"),
    ("base", "dpo"),
    ("dro", "dpo"),
  ]
  for one in found["comparisons"]:
    pair = {"baseline": one["baseline"], "model": one["model"]}
    assert one["scorers"] == statistics.compare(rows, **pair, selected_by=["a"])
    assert one["scorers"]["a-1"]["holm"] is None
  assert found["scorers"]["a-1"] == {
    "binary": False,
    "imported": False,
    "selected_training_data": True,
  }
  assert (found["prompts"], found["merged_prompts"], found["unit"]) == (30, 0, "image")
  again = comparisons.compare_all(
    rows.sample(frac=1, random_state=0),
    baseline="base",
    models=models,
    selected_by=["a"],
    unit="image",
  )
  assert again == found
  swapped = comparisons.compare_all(rows, baseline="dpo", models=["base", "dpo"])
  [one] = swapped["comparisons"]
  assert (one["baseline"], one["model"]) == ("dpo", "base")
  assert one["scorers"]["b-1"]["difference"] < 0 and list(swapped["models"]) == ["dpo", "base"]


def test_summary_of_a_model():
  scores = random_scores(["base", "dro"])
  found = comparisons.compare_all(table(scores), baseline="base")
  of = scores["dro"]
  assert found["models"]["dro"]["quality-1"] == pytest.approx(
    {
      "mean": of.mean(),
      "std_prompts": of.mean(1).std(ddof=1),
      "std_images": of.std(ddof=1),
      "prompts": 30,
      "images": 150,
    }
  )
  found = comparisons.compare_all(table(scores), baseline="base", unit="median:quality")
  summary = found["models"]["dro"]["quality-1"]
  assert summary["mean"] == pytest.approx(np.median(of, axis=1).mean())
  assert summary["std_prompts"] == pytest.approx(np.median(of, axis=1).std(ddof=1))
  assert (summary["prompts"], summary["images"]) == (30, 150)


def test_training_runs_are_summarized_as_a_group():
  models = ["base", "dro/seed0", "dro/seed1", "dro/seed2", "dpo/seed0"]
  scores = random_scores(models)
  found = comparisons.compare_all(table(scores), baseline="base")
  group = found["groups"]["dro"]
  assert group["models"] == models[1:4] and list(found["groups"]) == ["dro", "dpo"]
  means = [scores[name].mean() for name in models[1:4]]
  entries = [one["scorers"]["quality-1"] for one in found["comparisons"][:3]]
  assert group["scorers"]["quality-1"] == pytest.approx(
    {
      "runs": 3,
      "mean": np.mean(means),
      "std": np.std(means, ddof=1),
      "difference": np.mean([e["difference"] for e in entries]),
      "difference_std": np.std([e["difference"] for e in entries], ddof=1),
      "win_rate": np.mean([e["win_rate"] for e in entries]),
      "win_rate_std": np.std([e["win_rate"] for e in entries], ddof=1),
    }
  )
  assert found["groups"]["dpo"]["scorers"]["quality-1"]["std"] is None
  named = comparisons.compare_all(
    table(scores), baseline="base", groups={"base": "both", "dpo/seed0": "both"}
  )
  assert named["groups"]["both"]["models"] == ["base", "dpo/seed0"]
  assert named["groups"]["both"]["scorers"]["quality-1"]["runs"] == 2


def test_a_scorer_of_some_models_only():
  models = ["base", "dro", "dpo"]
  rows = pd.concat(
    [table(random_scores(models)), table(random_scores(models[:2], seed=1), scorer="judge")]
  )
  found = comparisons.compare_all(rows, baseline="base", imported=["judge"])
  assert [sorted(one["scorers"]) for one in found["comparisons"]] == [
    ["judge-1", "quality-1"],
    ["quality-1"],
    ["quality-1"],
  ]
  assert sorted(found["models"]["dpo"]) == ["quality-1"]
  with pytest.raises(ValueError, match=r"judge-1: prompt 0, seed 0 has no dpo score \(and 149"):
    comparisons.compare_all(rows, baseline="base")


def test_verdicts():
  entry = {"interval": [0.6, 0.7], "p_value": 0.01, "holm": 0.02, "difference": 0.1}
  entry["selected_training_data"] = False
  lost = entry | {"interval": [0.3, 0.4], "difference": -0.1}
  unsure = entry | {"holm": 0.06}
  judge = comparisons.judge
  assert judge({"a": entry, "b": unsure}) == {
    "won": ["a"],
    "lost": [],
    "undecided": ["b"],
    "result": "won",
  }
  assert judge({"a": entry, "b": lost})["result"] == "mixed"
  assert judge({"a": unsure, "b": lost})["result"] == "lost"
  assert judge({"a": unsure})["result"] == judge({})["result"] == "undecided"
  chose = entry | {"selected_training_data": True, "holm": None}
  assert judge({"a": chose, "b": unsure}) == {
    "won": [],
    "lost": [],
    "undecided": ["b"],
    "result": "undecided",
  }


def test_category_means():
  scores = random_scores(["base", "dro", "dpo"], prompts=4, seeds=2)
  rows = table(scores)
  rows["category"] = np.array(["position", "apple"])[rows["prompt_id"] % 2]
  found = comparisons.category_means(rows)
  assert [row["category"] for row in found] == ["position", "apple"]
  assert (
    list(found[0]["models"]) == ["base", "dro", "dpo"] and found[0]["scorer"] == "quality-1"
  )
  assert found[1]["models"]["dpo"] == {
    "mean": pytest.approx(scores["dpo"][[1, 3]].mean()),
    "n": 4,
  }
  two = statistics.by_category(rows, baseline="base", model="dpo")
  assert two[1]["tuned"] == pytest.approx(found[1]["models"]["dpo"]["mean"])


def test_models_are_named_in_errors():
  rows = table(random_scores(["base", "dro"]))
  with pytest.raises(ValueError, match="no rows of model 'dpo' .got base, dro"):
    comparisons.compare_all(rows, baseline="dpo")
  with pytest.raises(ValueError, match="no rows of model 'sft'"):
    comparisons.compare_all(rows, baseline="base", models=["dro", "sft"])
  with pytest.raises(ValueError, match="compared with itself .got base, base"):
    statistics.compare(rows, baseline="base", model="base")


@pytest.mark.parametrize(
  "path, value",
  [
    (("unit",), 3),
    (("baseline",), "other"),
    (("models", "dro", "quality-1", "mean"), "x"),
    (("comparisons", 0, "model"), "other"),
    (("comparisons", 0, "scorers", "quality-1", "wilcoxon"), float("nan")),
    (("comparisons", 0, "scorers", "quality-1", "wilson_interval"), 3),
    (("comparisons", 0, "scorers", "quality-1", "unit"), None),
    (("comparisons", 0, "verdict", "result"), "good"),
  ],
)
def test_damaged_results_are_seen(path, value):
  found = comparisons.compare_all(table(random_scores(["base", "dro"])), baseline="base")
  at = found
  for name in path[:-1]:
    at = at[name]
  at[path[-1]] = value
  assert not comparisons.are_comparisons(found)
  assert not any(map(comparisons.are_comparisons, ([], None, {}, {"models": 3})))


def test_tables_of_several_models():
  models = ["base", "dro/seed0", "dro/seed1"]
  texts = ["same", "same", *(f"prompt {p}" for p in range(28))]
  own = table(random_scores(models), texts=texts)
  judge = table(random_scores(models, seed=1), scorer="judge", texts=texts)
  judge.loc[0, "score"] = np.nan
  found = comparisons.compare_all(
    pd.concat([own, judge]), baseline="base", selected_by=["quality"], imported=["judge"]
  )
  text = comparison_text.comparisons_text(found)
  first, others, runs = (part.splitlines() for part in text.split("\n\n"))
  assert first[0].split()[:5] == ["scorer", "model", "mean", "std", "prompts"]
  cells = [line.split() for line in first[2:8]]
  assert [c[0] for c in cells] == ["judge-1"] * 3 + ["quality-1"] * 3
  of = found["models"]["dro/seed1"]["judge-1"]
  assert cells[2][1:5] == ["dro/seed1", f"{of['mean']:.3f}", f"{of['std_prompts']:.3f}", "29"]
  assert len(cells[0]) == 5  # the baseline has no comparison with itself
  assert cells[5][1] == "*" and cells[5][-2] == "-"  # no place in Holm's family
  assert len({len(line) for line in first[:8]}) == 1
  assert first[8:] == [
    "Compared with base by the mean of each prompt's images; std is over prompts.",
    "* had a part in the training, so it is not evidence",
    "1 prompt with the text of another, merged with it",
    "judge-1: 1 pair of base and dro/seed0 left out, because a score is missing",
    "judge-1: 1 pair of base and dro/seed1 left out, because a score is missing",
  ]
  assert others[2].split()[:3] == ["judge-1", "dro/seed1", "dro/seed0"] and len(others) == 4
  assert runs[2].split()[:3] == ["judge-1", "dro", "2"] and " ± " in runs[2] and len(runs) == 4
  two = comparisons.compare_all(
    own, baseline="base", models=["dro/seed0"], unit="median:quality"
  )
  text = comparison_text.comparisons_text(two)
  assert "by each prompt's image of median quality" in text and "against" not in text
