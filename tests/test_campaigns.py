"""Comparisons of a campaign's methods, and their held-out judge."""

import sys

import numpy as np
import pandas as pd
from conftest import ROOT
from scipy import stats
from statsmodels.stats.multitest import multipletests

from jaxpref.evaluation import score_rows
from jaxpref.shapes import flaws, prompts, render

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts there share modules

import campaign  # noqa: E402
import comparison  # noqa: E402
import patches  # noqa: E402
import scoring  # noqa: E402


def _rows(scores):
  """Returns rows of (model, scorer) -> scores by prompt, two images each."""
  rows = [
    (model, i // 2, i, f"prompt {i // 2}", "colors", scorer, "1", score)
    for (model, scorer), values in scores.items()
    for i, score in enumerate(np.repeat(values, 2))
  ]
  return pd.DataFrame(rows, columns=list(score_rows.COLUMNS))


def test_methods_are_compared_by_prompts_and_p_values_are_holms(monkeypatch):
  monkeypatch.setattr(comparison, "RESAMPLES", 100)
  rng = np.random.default_rng(0)
  base = rng.normal(size=40)
  effects = {"a": 0.6, "b": 0.0, "c": -0.9}
  found = {("base", s): base for s in comparison.SHOWN}
  for method, effect in effects.items():
    for seed in range(2):
      for s in comparison.SHOWN:
        found[f"{method}/seed{seed}", s] = base + effect + rng.normal(size=40)
  rows = _rows(found)
  compared = comparison.against(comparison.together(rows), "base")
  differences = {
    (method, s): np.mean([found[f"{method}/seed{k}", s] for k in range(2)], axis=0) - base
    for method in effects
    for s in comparison.SHOWN
  }
  p = [stats.ttest_1samp(values, 0).pvalue for values in differences.values()]
  holm = multipletests(p, method="holm")[1]
  for (method, s), expected in zip(differences, holm, strict=True):
    np.testing.assert_allclose(compared[method][s]["holm"], expected)
  results = {n: comparison.result(comparison.outcomes(e)) for n, e in compared.items()}
  assert results == {"a": "better", "b": "undecided", "c": "worse"}
  assert not comparison.parted(compared, campaign.SCORERS)
  compared["a"][scoring.VENDI] = compared["c"][scoring.VENDI]
  assert comparison.result(comparison.outcomes(compared["a"])) == "better"
  compared["a"][scoring.HELD_OUT] = compared["c"][scoring.HELD_OUT]
  assert comparison.result(comparison.outcomes(compared["a"])) == "mixed"
  assert comparison.parted(compared, campaign.SCORERS) == [
    "a wins by correct and quality and loses by likeness and Vendi"
  ]
  # Runs are apart from prompts: the spread is that of their means.
  over = comparison.over_runs(rows, "base")["a"]["shapes.quality"]
  means = [found[f"a/seed{k}", "shapes.quality"].mean() for k in range(2)]
  np.testing.assert_allclose(
    (over["mean"], over["std"]), (np.mean(means), np.std(means, ddof=1))
  )
  signs = comparison.matrix(
    comparison.each_other(comparison.together(rows), "base"), ["base", "a", "c"]
  )
  assert signs[2:] == ["| base |  | - | + |", "| a | + |  | + |", "| c | - | - |  |"]


def test_the_held_out_judge_sees_flawed_looks():
  rng = np.random.default_rng(0)
  specs = [prompts.draw_prompt(rng, "test") for _ in range(30)]
  clean, flawed = [], {name: [] for name in ("blur", "noise", "low_contrast")}
  for i, spec in enumerate(specs):
    draw = lambda looks, i=i, spec=spec: render.draw(  # noqa: E731
      flaws.flawed_scene(spec, looks, np.random.default_rng(i)), np.random.default_rng(i)
    )
    clean.append(draw(()))
    for name, images in flawed.items():
      images.append(draw((name,)))
  best = patches.likeness(clean, [""] * 30)
  assert best.max() <= 0
  for name, images in flawed.items():
    assert np.mean(patches.likeness(images, [""] * 30) < best) >= 0.8, name
