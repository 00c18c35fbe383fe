"""Advantages against numpy for every convention, and what must hold for all of them."""

import numpy as np
import pytest

from jaxpref.errors import UserError
from jaxpref.rewards import advantages as adv

RNG = np.random.default_rng(3)
REWARDS = RNG.normal(size=(5, 4))
FLAT, GROUP = REWARDS.ravel(), np.repeat(np.arange(5), 4)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", adv.SCALES)
def test_conventions_are_numpys(scale, ddof):
  centered = REWARDS - REWARDS.mean(1, keepdims=True)
  want = {
    "group": lambda: centered / (REWARDS.std(1, keepdims=True, ddof=ddof) + 1e-4),
    "global": lambda: centered / (REWARDS.std(ddof=ddof) + 1e-4),
    "none": lambda: centered,
  }[scale]()
  got = adv.advantages(FLAT, GROUP, scale=scale, ddof=ddof)
  np.testing.assert_allclose(got, want.ravel(), rtol=1e-12)
  assert got.dtype == np.float64


def test_the_batch_can_be_the_only_group():
  got = adv.advantages(FLAT, GROUP, center="global", scale="global", eps=0.0)
  np.testing.assert_allclose(got, (FLAT - FLAT.mean()) / FLAT.std(), rtol=1e-12)


def test_conventions_differ():
  found = [adv.advantages(FLAT, GROUP, scale=s, ddof=d) for s in adv.SCALES for d in (0, 1)]
  found.append(adv.advantages(FLAT, GROUP, center="global"))
  different = {tuple(np.round(f, 9)) for f in found}
  assert len(different) == 6  # with scale='none' ddof has no effect


def test_clip_is_symmetric():
  got = adv.advantages(FLAT, GROUP, clip=0.5)
  assert got.max() == 0.5 and got.min() == -0.5


@pytest.mark.parametrize("scale", adv.SCALES)
def test_equal_rewards_and_single_images_have_no_advantage(scale):
  equal = adv.advantages(np.full(6, 0.1), np.repeat([0, 1], 3), scale=scale)
  np.testing.assert_allclose(equal, 0.0, atol=1e-12)
  for ddof in (0, 1):
    alone = adv.advantages(FLAT[:3], np.arange(3), scale=scale, ddof=ddof)
    assert alone.tolist() == [0.0, 0.0, 0.0]


def test_integers_and_booleans_keep_their_fractions():
  for rewards in (np.array([0, 0, 0, 1]), np.array([False, False, False, True])):
    got = adv.advantages(rewards, np.zeros(4, int), scale="none")
    assert got.tolist() == [-0.25, -0.25, -0.25, 0.75]


def test_the_order_of_prompts_and_their_names_do_not_matter():
  order = RNG.permutation(20)
  shuffled = adv.advantages(FLAT[order], 7 - 3 * GROUP[order])
  np.testing.assert_allclose(shuffled, adv.advantages(FLAT, GROUP)[order], rtol=1e-12)


def test_several_rewards_are_normalised_before_they_are_summed():
  both = np.stack([FLAT, 1000 * FLAT[::-1]], 1)
  got = adv.sum_advantages(both, (0.5, 2.0), GROUP, eps=0.0)
  parts = [adv.advantages(column, GROUP, eps=0.0) for column in both.T]
  np.testing.assert_allclose(got, 0.5 * parts[0] + 2.0 * parts[1], rtol=1e-12)
  # Summed first, the wide reward would decide alone.
  first = adv.advantages(both @ (0.5, 2.0), GROUP, eps=0.0)
  assert np.abs(first - got / 2.5).max() > 0.1
  assert np.abs(adv.sum_advantages(both, (1, 1), GROUP, clip=0.3)).max() == 0.3


def test_windows_hold_a_prompts_last_rewards():
  prompts = ["a", "b", "a", "b"]
  got, windows = adv.windowed_advantages([1, 2, 3, 6], prompts, {}, size=3, least=3, eps=0.0)
  # Too few values: the batch's mean 3 and its deviation.
  deviation = np.std([1, 2, 3, 6])
  np.testing.assert_allclose(got, np.array([-2, -1, 0, 3]) / deviation, rtol=1e-12)
  assert windows == {"a": [1.0, 3.0], "b": [2.0, 6.0]}
  before = {name: list(window) for name, window in windows.items()}
  got, later = adv.windowed_advantages([5, 7], ["a", "a"], windows, size=3, least=3, eps=0.0)
  assert later == {"a": [3.0, 5.0, 7.0], "b": [2.0, 6.0]} and windows == before
  np.testing.assert_allclose(got, np.array([0, 2]) / np.std([3, 5, 7]), rtol=1e-12)


def test_softmax_weights_have_mean_one():
  weights = adv.softmax_weights(FLAT, beta=0.2)
  np.testing.assert_allclose(weights, np.exp(0.2 * FLAT) / np.exp(0.2 * FLAT).mean())
  by_group = adv.softmax_weights(1e4 * FLAT, beta=0.2, group=GROUP).reshape(5, 4)
  np.testing.assert_allclose(by_group.mean(1), 1.0)
  assert (by_group.argmax(1) == REWARDS.argmax(1)).all() and np.isfinite(by_group).all()
  np.testing.assert_allclose(adv.softmax_weights(np.ones(3), beta=9.0), 1.0)


def test_best_and_worst_of_each_group():
  best, worst, apart = adv.best_and_worst([1, 3, 2, 5, 5, 5], [4, 4, 4, 9, 9, 9])
  assert best.tolist() == [1, 3] and worst.tolist() == [0, 3] and apart.tolist() == [2, 0]


def test_what_cannot_be_is_one_line():
  with pytest.raises(UserError, match="scale of advantages must be one of group, global, none"):
    adv.advantages(FLAT, GROUP, scale="std")
  with pytest.raises(UserError, match=r"got \(20,\) and \(4,\)"):
    adv.advantages(FLAT, GROUP[:4])
