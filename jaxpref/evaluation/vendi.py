"""The Vendi score, a measure of the diversity of a set of images.

It is the effective number of different images (Friedman and Dieng 2023,
https://arxiv.org/abs/2210.02410): 1 if all are equal, n if all are orthogonal.
"""

import numpy as np
import scipy.linalg


def vendi_score(features: np.ndarray) -> float:
  """Computes exp(-sum l log l) over the eigenvalues l of the cosine similarities / n.

  Args:
    features: features of n items, [n, d]; no row may be zero.

  Returns:
    The score, between 1 and n.

  Raises:
    ValueError: `features` is empty or a row is zero.
  """
  if not len(features):
    raise ValueError("features must have at least one row")
  array = np.asarray(features, np.float64).reshape(len(features), -1)
  norms = np.linalg.norm(array, axis=1, keepdims=True)
  if not np.all(norms > 0):
    raise ValueError("a row of features is all zero")
  unit = array / norms
  values = scipy.linalg.eigvalsh(unit @ unit.T / len(unit))
  positive = values[values > 1e-12]
  return float(np.exp(-np.sum(positive * np.log(positive))))
