"""The summary of scores that `python -m jaxpref.score` prints."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxpref.data import image_scores
from jaxpref.errors import count

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def read(file: Path) -> tuple[np.ndarray, dict[str, int]]:
  """Returns the scores of a file, with NaN, and counts of images without one by reason."""
  facts = image_scores.read_facts(file)
  scores = image_scores.read(file, digest=facts.digest, images=facts.images)
  return scores, image_scores.read_failures(file)


def to_text(found: Mapping[str, tuple[np.ndarray, Mapping[str, int]]]) -> str:
  """Formats means, deviations and quantiles of scores, and counts of images without one.

  Args:
    found: from `read`, by scorer and version.
  """
  width = max(len("scorer"), *map(len, found))
  head = ("images", "mean", "std", *(f"{100 * q:.0f} %" for q in _QUANTILES), "failed")
  lines = [f"{'scorer':<{width}}" + "".join(f"{name:>10}" for name in head)]
  for key, (scores, failures) in found.items():
    good = scores[np.isfinite(scores)]
    values = ["-"] * (2 + len(_QUANTILES))
    if len(good):
      numbers = [good.mean(), good.std(ddof=len(good) > 1), *np.quantile(good, _QUANTILES)]
      values = [f"{number:.4g}" for number in numbers]
    fields = (f"{len(scores):,}", *values, f"{len(scores) - len(good):,}")
    lines.append(f"{key:<{width}}" + "".join(f"{field:>10}" for field in fields))
    if failures:
      reasons = ", ".join(f"{n:,} {reason}" for reason, n in failures.items())
      lines.append(f"  {count(len(scores) - len(good), 'image')} without a score: {reasons}")
  return "\n".join(lines)
