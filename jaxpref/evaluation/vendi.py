"""Diversity of a set of pictures: the Vendi score.

Friedman and Dieng, 2023 (https://arxiv.org/abs/2210.02410): the effective number of
different ones, 1 where all are alike, n where no two have anything in common.
"""

import numpy as np
import scipy.linalg


def vendi_score(features: np.ndarray) -> float:
  """exp(-sum lambda log lambda) over the eigenvalues of K / n, K the cosine similarities.

  Args:
    features: of n items, [n, d]; none of them zero.

  Returns:
    Between 1 and n.

  Raises:
    ValueError: there are no items, or one has no direction.
  """
  if not len(features):
    raise ValueError("there is nothing to score")
  array = np.asarray(features, np.float64).reshape(len(features), -1)
  norms = np.linalg.norm(array, axis=1, keepdims=True)
  if not np.all(norms > 0):
    raise ValueError("an item's features are all zero")
  unit = array / norms
  values = scipy.linalg.eigvalsh(unit @ unit.T / len(unit))
  positive = values[values > 1e-12]
  return float(np.exp(-np.sum(positive * np.log(positive))))
