"""The Vendi score of sets whose diversity is known."""

import numpy as np
import pytest

from jaxpref.evaluation.vendi import mean_distance, vendi_score


def test_sets_of_known_diversity():
  assert vendi_score(np.ones((7, 3))) == pytest.approx(1.0)
  assert vendi_score(np.eye(7)) == pytest.approx(7.0)
  twice = np.repeat(np.eye(4), 3, axis=0)  # four kinds, three of each
  assert vendi_score(twice) == pytest.approx(4.0)
  assert vendi_score(5.0 * twice) == pytest.approx(4.0)  # scale is of no account


def test_two_items_by_hand():
  # K / 2 = [[1, c], [c, 1]] / 2 has eigenvalues (1 +- c) / 2.
  c = 0.6
  pair = np.array([[1.0, 0.0], [c, np.sqrt(1 - c * c)]])
  values = np.array([(1 + c) / 2, (1 - c) / 2])
  assert vendi_score(pair) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_pictures_of_any_shape_and_more_items_than_features():
  rng = np.random.default_rng(0)
  images = rng.standard_normal((20, 2, 3))
  assert 1.0 < vendi_score(images) <= 6.0  # at most the rank
  assert vendi_score(images) == pytest.approx(vendi_score(images.reshape(20, 6)))


def test_nothing_to_score():
  with pytest.raises(ValueError, match="at least one row"):
    vendi_score(np.zeros((0, 3)))
  with pytest.raises(ValueError, match="all zero"):
    vendi_score(np.zeros((2, 3)))
  with pytest.raises(ValueError, match="not finite"):
    vendi_score(np.full((2, 3), np.nan))


def by_the_formula(features):
  """exp of the entropy of the eigenvalues of K / n, all n of them, in float64."""
  x = np.asarray(features, np.float64)
  x = x / np.sqrt((x * x).sum(1, keepdims=True))
  values = np.linalg.svd(x / np.sqrt(len(x)), compute_uv=False) ** 2
  return np.exp(-sum(v * np.log(v) for v in values if v > 0))


# Sizes, and the score that vendi-score 0.0.3 gives in float64 for `random_features`.
GOLDEN = {
  (6, 40): 5.562234483077046,
  (40, 6): 5.361703736208114,
  (64, 2048): 57.38644023587319,
  (50, 50): 28.714572819089465,
}


def random_features(n, d):
  return np.random.default_rng(n + d).normal(0.3, 1.0, size=(n, d))


@pytest.mark.parametrize("size", GOLDEN)
def test_score_is_the_formulas_and_the_stored_one(size):
  features = random_features(*size)
  got = vendi_score(features)
  assert got == pytest.approx(by_the_formula(features), rel=1e-11)
  assert got == pytest.approx(GOLDEN[size], rel=1e-11)


@pytest.mark.parametrize("size", GOLDEN)
def test_score_is_that_of_vendi_score(size):
  theirs = pytest.importorskip("vendi_score.vendi")
  features = random_features(*size)
  assert vendi_score(features) == pytest.approx(theirs.score_X(features), rel=1e-11)
  assert vendi_score(features) == pytest.approx(theirs.score_dual(features), rel=1e-11)


def test_score_is_exact_where_float32_is_not():
  row = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
  assert vendi_score(row.repeat(64, axis=0)) == pytest.approx(1.0, abs=1e-10)
  assert vendi_score(np.repeat(np.eye(8, 512, dtype=np.float32), 8, axis=0)) == pytest.approx(
    8.0, abs=1e-12
  )


def test_mean_distance_is_over_all_pairs():
  features = random_features(7, 4)
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  expected = np.mean([1 - unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j])
  assert mean_distance(features) == pytest.approx(expected)
  assert mean_distance(3 * features) == pytest.approx(expected)
  assert mean_distance(np.ones((5, 3))) == pytest.approx(0.0)
  assert mean_distance(np.eye(5)) == pytest.approx(1.0)
  with pytest.raises(ValueError, match="two items"):
    mean_distance(np.ones((1, 3)))
