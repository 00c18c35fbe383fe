"""The Vendi score of sets whose diversity is known."""

import numpy as np
import pytest

from jaxpref.evaluation.vendi import vendi_score


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
