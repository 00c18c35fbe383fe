"""Tests and intervals against scipy, statsmodels, stored numbers and simulations."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from golden import make_paired_tests
from statsmodels.stats import multitest
from test_comparisons import table

from jaxpref.evaluation import paired_tests as t
from jaxpref.evaluation import statistics

GOLDEN = json.loads((Path(__file__).parent / "golden/paired_tests.json").read_text())


@pytest.fixture(params=list(GOLDEN))
def golden(request):
  """Differences and what scipy and statsmodels once said of them."""
  stored = GOLDEN[request.param]
  return np.array(stored["difference"]), stored["expected"]


def check(d, expected):
  points = (d > 0).sum() + (d == 0).sum() / 2
  got = {
    "t_test": t.t_test(d),
    "wilcoxon": t.wilcoxon(d),
    "sign_test": t.sign_test(d),
    "effect_size": t.effect_size(d),
    "wilson_interval": t.wilson_interval(points, len(d)),
  }
  for name, value in got.items():
    assert value == pytest.approx(expected[name], rel=1e-9), name
  # Two estimates of one p, the second from at least 20,000 permutations.
  p = expected["permutation"]
  error = 4 * np.sqrt(2 * p * (1 - p) / 20_000) if len(d) > 9 else 1e-9
  assert t.permutation(d, seed=0, resamples=20_000) == pytest.approx(p, abs=error)


def test_numbers_are_the_stored_ones(golden):
  check(*golden)


def test_numbers_are_those_of_scipy_and_statsmodels(golden):
  check(golden[0], make_paired_tests.expected(golden[0]))


@pytest.mark.parametrize(
  "difference, expected",
  # From scipy 1.17.1 with zero_method="pratt" and PermutationMethod(), which enumerates.
  [
    ([1, 2, 0, -1, 3, 0, 2, 2], 0.09375),
    ([0.3, -0.1, 0.7, 0.2, -0.5], 0.625),
    ([-3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 0.02685546875),
    ([1, 0], 1.0),
  ],
)
def test_signed_ranks_of_few_prompts_are_exact(difference, expected):
  difference = np.array(difference, np.float64)
  assert t.wilcoxon(difference) == pytest.approx(expected)
  if len(difference) < 9:
    theirs = scipy.stats.wilcoxon(
      difference, zero_method="pratt", method=scipy.stats.PermutationMethod()
    )
    assert t.wilcoxon(difference) == pytest.approx(theirs.pvalue)


def test_wilsons_interval_is_scipys_without_ties():
  low, high = scipy.stats.binomtest(37, 60).proportion_ci(method="wilson")
  assert t.wilson_interval(37, 60) == pytest.approx([low, high])


def test_holm_is_statsmodels_and_leaves_out_what_has_no_p_value():
  p = {"a": 0.01, "b": 0.04, "c": 0.03, "none": None, "d": 0.9}
  expected = multitest.multipletests([0.01, 0.04, 0.03, 0.9], method="holm")[1]
  got = t.holm(p)
  assert list(got) == list(p) and got["none"] is None
  assert [got[k] for k in "abcd"] == pytest.approx(list(expected))
  # By hand: 4 x 0.01; 3 x 0.03; no less than that; no less than 0.9.
  assert [got[k] for k in "abcd"] == pytest.approx([0.04, 0.09, 0.09, 0.9])
  assert t.holm({"a": 0.2, "none": None}) == {"a": 0.2, "none": None}
  assert t.holm({}) == {}


def test_equal_differences_and_ties():
  for zero in (np.zeros(5), np.full(5, 1e-10)):
    assert [t.t_test(zero), t.wilcoxon(zero), t.sign_test(zero)] == [1.0, 1.0, 1.0]
    assert t.effect_size(zero) is None
  assert t.permutation(np.zeros(5), seed=0, resamples=100) == 1.0
  assert t.permutation(np.zeros(50), seed=0, resamples=100) == 1.0
  one = np.ones(1)
  assert [t.t_test(one), t.wilcoxon(one), t.sign_test(one), t.effect_size(one)] == [None] * 4
  assert t.permutation(one, seed=0, resamples=10) is None
  assert t.wilson_interval(1, 1) == [None, None]
  # Signs of 10 equal differences: only all and none are as extreme.
  assert t.permutation(np.full(10, 0.3), seed=0, resamples=2000) == 2 / 2**10
  assert t.sign_test(np.full(10, 0.3)) == pytest.approx(2 / 2**10)
  large = t.permutation(np.full(40, 0.3), seed=0, resamples=500)
  assert large == 1 / 501  # never 0: the observed signs are one of the assignments


def test_permutations_in_chunks(monkeypatch):
  d = np.array(GOLDEN["normal"]["difference"])
  whole = t.permutation(d, seed=3, resamples=5000)
  monkeypatch.setattr(t, "_CHUNK", len(d) * 700)
  assert t.permutation(d, seed=3, resamples=5000) == pytest.approx(whole, abs=0.02)


def within_binomial_bounds(hits, trials, rate):
  """Whether as few or as many hits have a probability of at least 1 in 1000."""
  return scipy.stats.binomtest(int(hits), trials, rate).pvalue >= 1e-3


def test_false_positives_are_five_in_a_hundred():
  """Two models of equal quality: the tests over prompts keep the level."""
  rng = np.random.default_rng(0)
  trials, prompts = 800, 40
  d = rng.normal(size=(trials, prompts)) + rng.exponential(size=(trials, prompts)) - 1
  p = {
    "t_test": [t.t_test(row) for row in d],
    "permutation": [t.permutation(row, seed=i, resamples=199) for i, row in enumerate(d)],
  }
  symmetric = rng.normal(size=(trials, prompts))
  p["wilcoxon"] = [t.wilcoxon(row) for row in symmetric]
  for name, values in p.items():
    hits = (np.asarray(values) <= 0.05).sum()
    assert within_binomial_bounds(hits, trials, 0.05), (name, hits / trials)
  # The sign test's p-values are discrete: its level is exact and below 5 %.
  sign = np.asarray([t.sign_test(row) for row in symmetric])
  wins = np.arange(prompts + 1)
  reachable = np.array([scipy.stats.binomtest(int(k), prompts).pvalue for k in wins])
  level = scipy.stats.binom.pmf(wins, prompts, 0.5)[reachable <= 0.05].sum()
  assert level < 0.05 and within_binomial_bounds((sign <= 0.05).sum(), trials, level)


def test_p_values_of_swapped_labels_are_uniform():
  """Whatever the models' true difference: swapped at random, each p is as likely."""
  rng = np.random.default_rng(1)
  real = np.abs(rng.normal(1.0, 1, size=200))  # one model is better on every prompt
  assert t.t_test(real) < 1e-15
  swapped = real * rng.choice([-1, 1], size=(500, 200))
  for p in (
    [t.t_test(row) for row in swapped],
    [t.wilcoxon(row) for row in swapped],
    [t.permutation(row, seed=i, resamples=199) for i, row in enumerate(swapped)],
  ):
    # Spread evenly over steps of 1/200, since p-values of permutations are discrete.
    jittered = np.asarray(p) - rng.uniform(0, 1 / 200, size=len(p))
    assert scipy.stats.kstest(np.clip(jittered, 0, 1), "uniform").pvalue > 1e-3


def test_power_is_not_zero():
  rng = np.random.default_rng(2)
  d = rng.normal(0.5, 1, size=(200, 40))
  expected = 1 - scipy.stats.nct.cdf(scipy.stats.t.ppf(0.975, 39), 39, 0.5 * np.sqrt(40))
  hits = sum(t.t_test(row) <= 0.05 for row in d)
  assert within_binomial_bounds(hits, 200, expected)


def simulate(rng, *, interaction, prompts=40, seeds=5, shift=0.0):
  """Scores of two models; `interaction` is the deviation of model and prompt together."""
  common = rng.normal(size=(prompts, 1))
  return {
    name: common
    + rng.normal(0, interaction, size=(prompts, 1))
    + rng.normal(0, 0.6, size=(prompts, seeds))
    + extra
    for name, extra in (("base", 0.0), ("tuned", shift))
  }


def test_the_unit_is_the_prompt_and_not_the_image():
  """Models differ in their luck with prompts: tests over images then reject far too often."""
  rng = np.random.default_rng(3)
  trials = 120
  scores = [simulate(rng, interaction=0.5) for _ in range(trials)]
  rows = pd.concat([table(of, scorer=f"trial {i}") for i, of in enumerate(scores)])
  found = statistics.compare(rows, unit="mean", resamples=50)
  hits = sum(entry["p_value"] <= 0.05 for entry in found.values())
  assert len(found) == trials and within_binomial_bounds(hits, trials, 0.05)
  over_images = [scipy.stats.ttest_1samp((s["tuned"] - s["base"]).ravel(), 0) for s in scores]
  assert np.mean([test.pvalue <= 0.05 for test in over_images]) > 0.15  # about 1 in 4


def test_intervals_cover_the_truth():
  """Of the win rate over images and of the mean difference, with 5 images of a prompt."""
  rng = np.random.default_rng(4)
  trials, covered = 400, {"win rate": 0, "difference": 0}
  # The difference of two images has the variance 2 (0.3^2 + 0.6^2).
  truth = scipy.stats.norm.cdf(0.2 / np.sqrt(2 * (0.3**2 + 0.6**2)))
  for seed in range(trials):
    scores = simulate(rng, interaction=0.3, prompts=60, shift=0.2)
    d = scores["tuned"] - scores["base"]
    sums = np.stack([(d > 0).sum(1), d.sum(1)], axis=1)
    rate, mean = t.bootstrap_interval(sums, np.full(60, 5), seed=seed, resamples=500)
    covered["win rate"] += rate[0] <= truth <= rate[1]
    covered["difference"] += mean[0] <= 0.2 <= mean[1]
  # Percentile intervals of 60 prompts are a little narrow: 94.2 % where 95 % is nominal.
  for name, hits in covered.items():
    assert within_binomial_bounds(hits, trials, 0.942), (name, hits / trials)


def test_the_unit_changes_the_win_rate():
  """By the mean of 5 images a true difference wins more prompts than image by image."""
  rng = np.random.default_rng(6)
  scores = simulate(rng, interaction=0.0, prompts=4000, shift=0.2)
  rates = {
    unit: statistics.compare(table(scores), unit=unit, resamples=10)["quality-1"]["win_rate"]
    for unit in ("image", "single", "median:quality", "mean")
  }
  by_image = scipy.stats.norm.cdf(0.2 / (0.6 * np.sqrt(2)))
  by_mean = scipy.stats.norm.cdf(0.2 / (0.6 * np.sqrt(2 / 5)))
  assert rates["image"] == pytest.approx(by_image, abs=0.02)
  assert rates["single"] == pytest.approx(by_image, abs=0.03)
  assert rates["mean"] == pytest.approx(by_mean, abs=0.03)
  assert by_image + 0.03 < rates["median:quality"] < rates["mean"]


def scored(rng, *, noise):
  """Three scorers of two models with the same images; noise lowers the tuned model's."""
  parts = []
  for name in ("a", "b", "c"):
    base = rng.normal(size=(200, 4))
    tuned = base - noise * rng.uniform(size=base.shape)
    parts.append(table({"base": base, "tuned": tuned}, scorer=name))
  return pd.concat(parts)


@pytest.mark.parametrize("unit", ["image", "mean", "single", "median:a"])
def test_a_model_beside_itself(unit):
  found = statistics.compare(scored(np.random.default_rng(7), noise=0.0), unit=unit)
  assert len(found) == 3
  for entry in found.values():
    assert (entry["win_rate"], entry["tie"], entry["difference"]) == (0.5, 1.0, 0.0)
    assert entry["interval"] == [0.5, 0.5] and entry["difference_interval"] == [0.0, 0.0]
    tests = ("p_value", "wilcoxon", "sign_test", "permutation", "holm")
    assert [entry[name] for name in tests] == [1.0] * 5 and entry["effect_size"] is None
    assert statistics.outcome(entry) == "undecided"
    if unit != "image":
      low, high = entry["wilson_interval"]
      assert low < 0.5 < high


@pytest.mark.parametrize("unit", ["image", "mean", "single", "median:a"])
def test_a_model_with_noise_loses_by_every_scorer(unit):
  found = statistics.compare(scored(np.random.default_rng(8), noise=1.0), unit=unit)
  assert len(found) == 3
  for entry in found.values():
    assert entry["win_rate"] < 0.5 and entry["difference"] < 0 and entry["effect_size"] < 0
    assert statistics.outcome(entry, adjusted=True) == "lost"
