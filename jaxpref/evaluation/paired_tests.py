"""Tests and intervals for paired scores, one value per prompt.

`difference` is an array [prompts] of the tuned model's value minus the baseline's. All tests
are two-sided. A p-value that does not exist, as with one prompt, is None.
"""

from collections.abc import Mapping

import numpy as np
import scipy.stats
from statsmodels.stats import proportion

TOLERANCE = 1e-9  # two scores that differ by at most this are equal
_ENUMERATED = 13  # prompts whose 8192 assignments of signs are all compared
_CHUNK = 4_000_000  # random numbers held at once; limits the memory to about 100 MB


def t_test(difference: np.ndarray) -> float | None:
  """Computes the p-value of the paired t-test.

  If all differences are equal, the t statistic would be 0 / 0 or x / 0: the p-value is then
  that of the sign test.
  """
  if len(difference) < 2:
    return None
  if np.ptp(difference) <= TOLERANCE:
    return 1.0 if abs(difference.mean()) <= TOLERANCE else 2.0 ** (1 - len(difference))
  return float(scipy.stats.ttest_1samp(difference, 0.0).pvalue)


def wilcoxon(difference: np.ndarray) -> float | None:
  """Computes the p-value of Wilcoxon's signed-rank test, zeros ranked as Pratt proposed.

  Up to 13 prompts it is exact whether or not there are ties: all signs of the ranks are
  enumerated. Above, scipy chooses between the exact distribution and the normal one.
  """
  prompts = len(difference)
  if prompts < 2:
    return None
  difference = _without_ties(difference)
  if not difference.any():
    return 1.0
  if prompts <= _ENUMERATED:  # where there are ties, scipy takes seconds for the same
    ranks = np.sign(difference) * scipy.stats.rankdata(np.abs(difference))
    return permutation(ranks, seed=0, resamples=2**prompts)
  return float(scipy.stats.wilcoxon(difference, zero_method="pratt").pvalue)


def sign_test(difference: np.ndarray) -> float | None:
  """Computes the p-value of the binomial test of wins against losses, without ties."""
  if len(difference) < 2:
    return None
  signs = np.sign(_without_ties(difference))
  decided = int(np.count_nonzero(signs))
  if not decided:
    return 1.0
  return float(scipy.stats.binomtest(int((signs > 0).sum()), decided).pvalue)


def permutation(difference: np.ndarray, *, seed: int, resamples: int) -> float | None:
  """Computes the p-value of the sign-flip permutation test of the mean.

  It assumes only that under the null hypothesis each difference is as likely as its negative.
  All 2^n assignments of signs are enumerated if there are at most `resamples` of them.
  Otherwise `resamples` random ones are compared, and p = (1 + those as extreme) /
  (1 + resamples).

  Args:
    difference: [prompts].
    seed: seed of the random signs.
    resamples: number of random assignments.
  """
  prompts = len(difference)
  if prompts < 2:
    return None
  total = difference.sum()
  # Sums of the same numbers in another order differ in the last bits.
  least = abs(total) - 1e-12 * np.abs(difference).sum()
  if 2**prompts <= resamples:
    flipped = np.arange(2**prompts)[:, None] >> np.arange(prompts) & 1
    return float((np.abs(total - 2 * flipped @ difference) >= least).mean())
  rng = np.random.default_rng(seed)
  extreme, left = 1, resamples
  while left > 0:
    size = min(left, max(1, _CHUNK // prompts))
    flipped = rng.integers(2, size=(size, prompts), dtype=np.int8).astype(np.float64)
    extreme += int((np.abs(total - 2 * flipped @ difference) >= least).sum())
    left -= size
  return extreme / (1 + resamples)


def effect_size(difference: np.ndarray) -> float | None:
  """Computes Cohen's d_z, mean / standard deviation; None if all differences are equal."""
  if len(difference) < 2 or np.ptp(difference) <= TOLERANCE:
    return None
  return float(difference.mean() / difference.std(ddof=1))


def wilson_interval(points: float, prompts: int) -> list[float] | list[None]:
  """Computes Wilson's 95 % interval of a win rate over prompts.

  Args:
    points: wins, plus half of the ties.
    prompts: number of prompts.

  Returns:
    `[low, high]`; `[None, None]` with one prompt, as for `bootstrap_interval`.
  """
  if prompts < 2:
    return [None, None]
  low, high = proportion.proportion_confint(points, prompts, method="wilson")
  return [float(low), float(high)]


def bootstrap_interval(
  sums: np.ndarray, counts: np.ndarray, *, seed: int, resamples: int
) -> list[list[float]] | list[list[None]]:
  """Computes 95 % percentile bootstrap intervals of means, by resampling prompts.

  Args:
    sums: sums of each quantity over the images of a prompt, [prompts, quantities].
    counts: number of images of each prompt, [prompts].
    seed: seed of the resampling.
    resamples: number of resamples.

  Returns:
    `[low, high]` for each quantity; `[None, None]` with only one prompt, where resampling
    would give an interval of width 0.
  """
  prompts, quantities = sums.shape
  if prompts < 2:
    return [[None, None] for _ in range(quantities)]
  rng = np.random.default_rng(seed)
  means = []
  left = resamples
  while left > 0:
    size = min(left, max(1, _CHUNK // prompts))
    chosen = rng.integers(prompts, size=(size, prompts))
    total = np.stack([s[chosen].sum(1) for s in sums.T], axis=1)
    means.append(total / counts[chosen].sum(1)[:, None])
    left -= size
  bounds = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
  return [[float(low), float(high)] for low, high in bounds.T]


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
  """Adjusts the p-values of one family by Holm's method; None stays None and does not count.

  The numbers are those of statsmodels' `multipletests`, which collects garbage at each call:
  beside jax that takes half a second.
  """
  known = {key: p for key, p in p_values.items() if p is not None}
  ascending = sorted(known, key=known.__getitem__)
  products = np.arange(len(known), 0, -1) * np.array([known[key] for key in ascending])
  adjusted = np.minimum(np.maximum.accumulate(products), 1.0)
  return dict(p_values) | dict(zip(ascending, adjusted.tolist(), strict=True))


def _without_ties(difference: np.ndarray) -> np.ndarray:
  return np.where(np.abs(difference) <= TOLERANCE, 0.0, difference)
