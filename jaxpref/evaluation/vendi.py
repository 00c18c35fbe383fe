"""The Vendi score and the mean distance, measures of the diversity of a set of images.

The Vendi score is the effective number of different images (Friedman and Dieng 2023,
https://arxiv.org/abs/2210.02410): 1 if all are equal, n if all are orthogonal. Both measures
depend on the features and on n, so only sets of one size and one kind of features compare.
"""

import numpy as np
import scipy.linalg


def vendi_score(features: np.ndarray) -> float:
  """Computes exp(-sum l log l) over the eigenvalues l of the cosine similarities / n.

  With more items than features, the eigenvalues are those of the features' second moments,
  which are the same apart from zeros. All is computed in float64: in float32, equal items give
  more than 1.

  Args:
    features: features of n items, [n, d] or of any shape [n, ...].

  Returns:
    The score, between 1 and n.

  Raises:
    ValueError: `features` is empty, or a row is zero or not finite.
  """
  unit = _unit(features)
  n, d = unit.shape
  values = scipy.linalg.eigvalsh((unit.T @ unit if n > d else unit @ unit.T) / n)
  positive = values[values > 1e-12]
  return float(np.exp(-np.sum(positive * np.log(positive))))


def mean_distance(features: np.ndarray) -> float:
  """Computes the mean cosine distance, 1 - cosine, over all pairs of different items.

  Args:
    features: features of n items, [n, d] or of any shape [n, ...].

  Raises:
    ValueError: there is only one item, or a row is zero or not finite.
  """
  unit = _unit(features)
  n = len(unit)
  if n < 2:
    raise ValueError("a distance needs two items (got 1)")
  total = unit.sum(0)
  return float(1 - (total @ total - n) / (n * (n - 1)))


def _unit(features: np.ndarray) -> np.ndarray:
  if not len(features):
    raise ValueError("features must have at least one row")
  array = np.asarray(features, np.float64).reshape(len(features), -1)
  norms = np.linalg.norm(array, axis=1, keepdims=True)
  if not np.all((norms > 0) & np.isfinite(norms)):
    raise ValueError("a row of features is all zero or not finite")
  return array / norms
