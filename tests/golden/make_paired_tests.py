"""Writes paired_tests.json: numbers of scipy and statsmodels for fixed differences.

  cd tests && python golden/make_paired_tests.py

Nothing of jaxpref is used.
"""

import json
from pathlib import Path

import numpy as np
import scipy.stats
from statsmodels.stats import descriptivestats, proportion


def differences():
  """Differences of one prompt each: continuous, with ties and zeros, few, skewed."""
  rng = np.random.default_rng(5)
  return {
    "normal": rng.normal(0.2, 1, size=60),
    "ties": rng.integers(-2, 4, size=80).astype(float),
    "few": rng.normal(0.5, 1, size=9),
    "skewed": rng.exponential(size=40) - 0.7,
  }


def expected(d):
  """Returns the numbers by the names of `jaxpref.evaluation.paired_tests`."""
  points = (d > 0).sum() + (d == 0).sum() / 2
  flips = scipy.stats.permutation_test(
    (d,), np.mean, permutation_type="samples", n_resamples=100_000, batch=10_000
  )
  return {
    "t_test": scipy.stats.ttest_rel(d + 3, np.full(len(d), 3.0)).pvalue,
    "wilcoxon": scipy.stats.wilcoxon(d, zero_method="pratt").pvalue,
    "sign_test": descriptivestats.sign_test(d)[1],
    "permutation": flips.pvalue,
    "effect_size": np.mean(d) / np.std(d, ddof=1),
    "wilson_interval": list(proportion.proportion_confint(points, len(d), method="wilson")),
  }


if __name__ == "__main__":
  found = {
    name: {"difference": list(d), "expected": expected(d)} for name, d in differences().items()
  }
  text = json.dumps(found, indent=1, default=float)
  Path(__file__).with_suffix("").with_name("paired_tests.json").write_text(text + "\n")
