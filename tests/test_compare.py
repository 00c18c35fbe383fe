"""The statistics of a comparison against scipy and against tables made by hand."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from ml_collections import ConfigDict

from jaxpref.evaluation import best_checkpoint, paired_tests, score_rows, score_text
from jaxpref.evaluation import statistics as c


def table(base, tuned, *, scorer="quality", categories=("counting",)):
  """Rows from two arrays of scores [prompts, seeds]."""
  base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
  rows = [
    (model, p, s, f"prompt {p}", categories[p % len(categories)], scorer, "1", score)
    for model, scores in (("base", base), ("tuned", tuned))
    for (p, s), score in np.ndenumerate(scores)
  ]
  return pd.DataFrame(rows, columns=list(score_rows.COLUMNS))


def noisy(prompts=40, seeds=3, shift=0.2, seed=0):
  rng = np.random.default_rng(seed)
  common = rng.normal(size=(prompts, 1))
  base = common + rng.normal(size=(prompts, seeds))
  return base, common + shift + rng.normal(size=(prompts, seeds))


def test_hand_made_table():
  # Pairs: tie, win, loss, win; prompt means differ by 0.05 and 0.2.
  rows = table([[0.5, 0.5], [0.5, 0.1]], [[0.5, 0.6], [0.4, 0.6]])
  e = c.compare(rows)["quality-1"]
  assert (e["win"], e["tie"], e["loss"]) == (0.5, 0.25, 0.25)
  assert e["win_rate"] == 0.625
  assert e["win_rate_decided"] == pytest.approx(2 / 3)
  assert e["base"] == {"mean": pytest.approx(0.4), "n": 4, "std": pytest.approx(0.2)}
  assert e["tuned"]["mean"] == pytest.approx(0.525)
  assert e["difference"] == pytest.approx(0.125)
  # t = mean / (std / sqrt(2)) = 0.125 / 0.075 with one degree of freedom, whose
  # two-sided tail is 1 - 2 atan(t) / pi.
  assert e["p_value"] == pytest.approx(1 - 2 * np.arctan(0.125 / 0.075) / np.pi)
  assert e["prompts"] == 2 and not e["binary"]
  assert not e["selected_training_data"]


def test_means_and_p_value_match_scipy():
  base, tuned = noisy()
  e = c.compare(table(base, tuned))["quality-1"]
  assert e["tuned"]["mean"] == pytest.approx(tuned.mean())
  assert e["tuned"]["std"] == pytest.approx(tuned.std(ddof=1))
  expected = scipy.stats.ttest_1samp((tuned - base).mean(1), 0.0).pvalue
  assert e["p_value"] == pytest.approx(expected, rel=1e-9)
  assert expected != pytest.approx(scipy.stats.ttest_rel(tuned.ravel(), base.ravel()).pvalue)


def test_intervals_match_scipys_bootstrap():
  base, tuned = noisy()
  e = c.compare(table(base, tuned), resamples=20_000)["quality-1"]
  for got, per_prompt, step in (
    (e["interval"], (tuned > base).mean(1), 1 / 120),  # shares move in steps
    (e["difference_interval"], (tuned - base).mean(1), 0.0),
  ):
    expected = scipy.stats.bootstrap(
      (per_prompt,), np.mean, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    # An end of an interval from 20,000 resamples has a standard error of 0.5 % of
    # the interval's width; 2 % is three of them for the difference of two runs.
    width = expected.high - expected.low
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * width + 1.01 * step)


def test_interval_is_exact_where_all_resamples_can_be_listed():
  """Unequal prompts: a resample's mean is over its images, not over its prompts."""
  sums, counts = np.array([3.0, 1.0, 0.0, 2.0]), np.array([3, 2, 1, 5])
  every = [
    sums[list(d)].sum() / counts[list(d)].sum() for d in itertools.product(range(4), repeat=4)
  ]
  expected = np.quantile(every, [0.025, 0.975])
  [got] = paired_tests.bootstrap_interval(sums[:, None], counts, seed=0, resamples=50_000)
  np.testing.assert_allclose(got, expected, atol=0.01)


def test_interval_covers_the_truth_about_95_times_in_100():
  hits = 0
  for seed in range(200):
    rng = np.random.default_rng(seed)
    points = rng.binomial(4, rng.beta(3, 2, size=60)).astype(float)  # mean 0.6
    [[low, high]] = paired_tests.bootstrap_interval(
      points[:, None], np.full(60, 4), seed=seed, resamples=1000
    )
    hits += low <= 0.6 <= high
  # Binomial(200, 0.95) has a standard deviation of 3.1.
  assert 178 <= hits <= 198


def test_copies_of_an_image_are_no_evidence():
  base, tuned = noisy(seeds=1)
  once = c.compare(table(base, tuned))["quality-1"]
  copied = c.compare(table(base.repeat(8, 1), tuned.repeat(8, 1)))["quality-1"]
  for field in ("interval", "difference_interval", "p_value"):
    assert copied[field] == pytest.approx(once[field])
  spread = c.compare(table(base.repeat(8, 0), tuned.repeat(8, 0)))["quality-1"]
  width = np.diff(once["interval"])[0]
  assert np.diff(spread["interval"])[0] == pytest.approx(width / np.sqrt(8), rel=0.1)


def test_memory_chunks_keep_the_number_of_resamples(monkeypatch):
  sums = np.random.default_rng(0).normal(size=(30, 1))
  whole = paired_tests.bootstrap_interval(sums, np.ones(30, int), seed=3, resamples=5000)
  monkeypatch.setattr(paired_tests, "_CHUNK", 30 * 700)
  parts = paired_tests.bootstrap_interval(sums, np.ones(30, int), seed=3, resamples=5000)
  assert parts == whole


def test_binary_scores():
  base = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
  tuned = np.array([[1, 1], [1, 1], [1, 0], [0, 1]])
  e = c.compare(table(base, tuned, scorer="verifier"))["verifier-1"]
  assert e["binary"]
  assert (e["win"], e["tie"], e["loss"]) == (0.375, 0.5, 0.125)
  assert e["win_rate"] == 0.625
  assert e["win_rate_decided"] == 0.75


def test_constant_scores():
  same = c.compare(table(np.ones((5, 2)), np.ones((5, 2))))["quality-1"]
  assert same["tie"] == 1.0 and same["win_rate_decided"] is None
  assert same["interval"] == [0.5, 0.5] and same["p_value"] == 1.0
  assert c.outcome(same) == "undecided"
  # 0.3 - 0.2 and 0.8 - 0.7 differ in the last bit; that is not a variance.
  base = np.array([[0.2], [0.7], [0.1]] * 3)
  moved = c.compare(table(base, base + 0.1))["quality-1"]
  assert moved["p_value"] == 2 * 0.5**9 and moved["interval"] == [1.0, 1.0]
  assert c.outcome(moved) == "won"
  assert c.outcome(c.compare(table(base + 0.1, base))["quality-1"]) == "lost"


def test_difference_below_the_tolerance_is_a_tie():
  e = c.compare(table([[0.5], [0.5]], [[0.5 + 1e-10], [0.5 + 1e-8]]))["quality-1"]
  assert (e["win"], e["tie"]) == (0.5, 0.5)


def test_single_prompt_claims_nothing():
  e = c.compare(table([[0.1, 0.2]], [[0.5, 0.6]]))["quality-1"]
  assert e["interval"] == e["difference_interval"] == [None, None]
  assert e["p_value"] is None and c.outcome(e) == "undecided"
  lone = c.compare(table([[0.1]], [[0.5]]))["quality-1"]
  assert lone["base"] == {"mean": 0.1, "n": 1, "std": None}


def test_outcome_needs_interval_test_and_direction():
  clear = {"interval": [0.6, 0.7], "p_value": 0.01, "difference": 0.1}
  assert c.outcome(clear) == "won"
  assert c.outcome({**clear, "p_value": 0.06}) == "undecided"
  assert c.outcome({**clear, "interval": [0.49, 0.7]}) == "undecided"
  assert c.outcome({**clear, "difference": -0.1}) == "undecided"


def test_result_is_sorted_plain_json_and_repeatable():
  base, tuned = noisy(prompts=8)
  rows = pd.concat([table(base, tuned, scorer=s) for s in ("z", "a", "m")])
  results = c.compare(rows, selected_by=["a", "m-1"])
  assert list(results) == ["a-1", "m-1", "z-1"]
  flags = [e["selected_training_data"] for e in results.values()]
  assert flags == [True, True, False]
  for entry in results.values():
    assert list(entry) == sorted(entry)
  assert json.loads(json.dumps(results, allow_nan=False)) == results
  shuffled = rows.sample(frac=1, random_state=0)
  assert c.compare(shuffled, selected_by=["a", "m-1"]) == results
  # A scorer's numbers do not depend on its neighbours, only on the seed.
  assert c.compare(table(base, tuned, scorer="z"))["z-1"] == results["z-1"]
  other = c.compare(table(base, tuned, scorer="z"), seed=1)["z-1"]
  assert other["difference_interval"] != results["z-1"]["difference_interval"]


def test_bad_rows_are_named():
  rows = table(*noisy(prompts=4, seeds=2))
  tuned = (rows["model"] == "tuned") & (rows["prompt_id"] == 2) & (rows["seed"] == 1)
  with pytest.raises(ValueError, match=r"^quality-1: prompt 2, seed 1 has no tuned sc"):
    c.compare(rows[~tuned])
  with pytest.raises(ValueError, match=r"prompt 0, seed 0 has no base .*\(and 1 more"):
    c.by_category(rows[(rows["model"] == "tuned") | (rows["prompt_id"] != 0)])
  with pytest.raises(ValueError, match=r"model tuned, prompt 2, seed 1 occurs twice"):
    c.compare(pd.concat([rows, rows[tuned]]))
  with pytest.raises(ValueError, match=r"prompt 2, seed 1 must be finite \(got nan"):
    c.compare(rows.assign(score=rows["score"].mask(tuned)))
  with pytest.raises(ValueError, match="lack the columns prompt_id, seed"):
    c.compare(rows.drop(columns=["seed", "prompt_id"]))
  with pytest.raises(ValueError, match="no rows of model 'base' .got ema"):
    c.compare(rows[rows["model"] == "tuned"].assign(model="ema"))


def test_categories_in_genevals_order_then_by_name():
  names = ("zebra", "position", "apple", "single_object", "color_attribution")
  base, tuned = noisy(prompts=10, seeds=2)
  rows = pd.concat([table(base, tuned, scorer=s, categories=names) for s in "ba"])
  got = c.by_category(rows)
  order = ["single_object", "position", "color_attribution", "apple", "zebra"]
  assert [r["category"] for r in got[::2]] == order
  assert [r["scorer"] for r in got[:2]] == ["a-1", "b-1"]
  position = got[2]
  assert position["n"] == 4
  assert position["base"] == pytest.approx(base[[1, 6]].mean())
  assert position["difference"] == pytest.approx((tuned - base)[[1, 6]].mean())


def test_text_table():
  rows = table([[0.5, 0.5], [0.5, 0.1]], [[0.5, 0.6], [0.4, 0.6]])
  text = score_text.to_text(c.compare(rows, selected_by=["quality"]), c.by_category(rows))
  lines = text.splitlines()
  assert " ".join(lines[2].split()) == (
    "quality-1 * 0.400 ± 0.200 0.525 ± 0.096 +0.125 50 % 25 % 25 % 62 % (50 to 75 %) 0.34"
  )
  assert len(lines[0]) == len(lines[1]) == len(lines[2])
  assert "* had a part in the training" in lines[3]
  assert " ".join(lines[-1].split()) == "counting quality-1 0.400 0.525 +0.125 4"
  assert score_text.to_text({}, []).startswith("scorer")


@pytest.mark.parametrize(
  "share, text",
  [(0.714, "71 %"), (0, "0 %"), (1, "100 %"), (0.996, "99.6 %"), (0.004, "0.4 %")],
)
def test_percent(share, text):
  assert score_text.percent(share) == text


def test_numbers_and_p_values():
  values = (0.5, 20.683, 153.42, 0.00012, 0.0, None)
  texts = ["0.500", "20.68", "153.4", "1.2e-04", "0.000", "-"]
  assert [score_text.number(v) for v in values] == texts
  assert score_text.number(0.25, sign=True) == "+0.250"
  texts = ["0.023", "1e-12", "< 1e-15", "< 1e-15", "1", "-"]
  assert [score_text.p_text(p) for p in (0.0234, 1e-12, 1e-40, 0.0, 1.0, None)] == texts


def test_files(tmp_path):
  rows = table(*noisy(prompts=5)).assign(extra=1)
  score_rows.write_rows(tmp_path / "deep" / "scores.parquet", rows)
  read = pd.read_parquet(tmp_path / "deep" / "scores.parquet")
  assert tuple(read.columns) == score_rows.COLUMNS
  assert c.compare(read) == c.compare(rows)

  path = tmp_path / "results.json"
  c.write_results(path, {"b": 1, "a": None})
  assert json.loads(path.read_text()) == {"a": None, "b": 1}
  with pytest.raises(ValueError, match="JSON compliant"):
    c.write_results(path, {"a": float("nan")})
  assert json.loads(path.read_text()) == {"a": None, "b": 1}
  assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "results.json"]


def test_evaluations_by_other_versions_of_a_scorer_are_not_compared(tmp_path):
  config = ConfigDict({"evaluate": {"seed": 1, "num_steps": 2, "every": 1}})
  settings = best_checkpoint.settings_of(config, ["a star"], ["shapes.quality"])
  before = {**settings, "scorers": ["shapes.quality"]}  # as it was written without versions
  (entry,) = c.compare(table(*noisy(prompts=5)), resamples=10).values()
  for update, made, key in ((1, settings, "shapes.quality-2"), (2, before, "shapes.quality-1")):
    directory = tmp_path / "evaluation" / str(update)
    c.write_results(
      directory / "results.json",
      {key: entry | {"tuned": entry["tuned"] | {"mean": 0.1 * update}}},
    )
    best_checkpoint.write_settings(directory, made)
  assert best_checkpoint.find(tmp_path, settings, [1, 2]) == best_checkpoint.Best(
    1, "shapes.quality-2", 0.1
  )


def test_results_of_earlier_versions_are_read():
  """They lack the fields of tests and units that came later."""
  (entry,) = c.compare(table(*noisy(prompts=5)), resamples=10).values()
  later = {"unit", "wilcoxon", "sign_test", "permutation", "holm", "effect_size"}
  later |= {"wilson_interval", "dropped", "merged_prompts"}
  old = {name: value for name, value in entry.items() if name not in later}
  assert len(old) == len(entry) - len(later)
  assert c.are_results({"quality-1": old}) and c.outcome(old) == c.outcome(entry)
  for name in old:
    assert not c.are_results({"quality-1": {k: v for k, v in old.items() if k != name}})
