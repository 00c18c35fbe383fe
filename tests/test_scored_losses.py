"""Losses on scored samples: what they have in common, and what tells them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.losses import dgpo, nft

RNG = np.random.default_rng(11)
RESIDUAL, OLD, REF = (RNG.normal(size=(6, 3, 2)) for _ in range(3))
ADVANTAGE = RNG.normal(size=6)


pytestmark = pytest.mark.usefixtures("in_float64")


def error(residual):
  return jnp.mean(jnp.square(residual), axis=(1, 2))


def gradient(loss):
  return jax.grad(lambda residual: jnp.sum(loss(residual)))(jnp.array(RESIDUAL))


WEIGHTED = lambda residual: ADVANTAGE * error(residual)  # noqa: E731


def test_where_the_policy_sampled_awm_has_the_weighted_errors_gradient():
  old = error(RESIDUAL)
  found = gradient(lambda x: losses.awm_loss(error(x), old, ADVANTAGE, clip=0.1))
  np.testing.assert_allclose(found, gradient(WEIGHTED), atol=1e-15)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_so_has_nft(beta):
  clip = 5.0
  good = nft.optimality(jnp.array(ADVANTAGE), clip=clip)
  found = gradient(
    lambda x: clip * losses.nft_loss(x, jnp.array(RESIDUAL), good, beta=beta, adaptive=False)
  )
  np.testing.assert_allclose(found, gradient(WEIGHTED), atol=1e-14)
  # Not where the samples are of another policy.
  apart = gradient(
    lambda x: clip * losses.nft_loss(x, jnp.array(OLD), good, beta=beta, adaptive=False)
  )
  assert np.abs(apart - gradient(WEIGHTED)).max() > 0.1


def test_so_has_dgpo_up_to_the_groups_weight():
  old, ref = error(RESIDUAL)[None], error(REF)[None]
  found = gradient(
    lambda x: losses.dgpo_loss(error(x)[None], old, ref, ADVANTAGE[None], beta=9.0, clip=0.01)
  )
  preference = 9.0 * np.mean(ADVANTAGE * (error(RESIDUAL) - error(REF)))
  weight = 1 / (1 + np.exp(-preference)) / len(ADVANTAGE)
  np.testing.assert_allclose(found, weight * gradient(WEIGHTED), atol=1e-15)


@pytest.mark.long
def test_a_group_of_two_has_the_gradient_of_dpo():
  """Advantages of +1 and -1; dgpo's beta is of a mean, dpo's of half a difference."""
  err = jnp.array([[0.3], [0.5]])
  ref = jnp.array([[0.35], [0.45]])
  dpo = jax.grad(lambda e: losses.dpo_loss(*e, *ref, beta=8.0).sum())(err)
  group = jax.grad(
    lambda e: losses.dgpo_loss(
      e.T, err.T, ref.T, jnp.array([[1.0, -1.0]]), beta=8.0, clip=0.1
    ).sum()
  )(err)
  np.testing.assert_allclose(dpo, 8.0 * group, rtol=1e-12)


@pytest.mark.long
def test_without_an_advantage_nothing_is_learned():
  zero, err = jnp.zeros(6), error(RESIDUAL)
  assert not gradient(lambda x: losses.awm_loss(error(x), error(OLD), zero)).any()
  middle = nft.optimality(zero, clip=5.0)
  at_old = gradient(lambda x: losses.nft_loss(x, jnp.array(RESIDUAL), middle, beta=1.0))
  np.testing.assert_allclose(at_old, 0.0, atol=1e-15)
  rows = err[None], error(OLD)[None], error(REF)[None], zero[None]
  assert losses.dgpo_loss(*rows, beta=9.0, clip=0.1) == 0


def test_bad_samples_cannot_run_away():
  """Minimised over the prediction, a loss on bad samples must have a least value."""
  far = jnp.array(1e3 * RESIDUAL)
  bad = -jnp.ones(6)
  plain = gradient(lambda x: bad * error(x + 1e3 * RESIDUAL))
  assert jnp.sum(plain * far) < 0  # the weighted error falls for ever
  pulled = jax.grad(lambda x: losses.nft_loss(x, jnp.array(OLD), jnp.zeros(6), beta=1.0).sum())
  assert jnp.sum(pulled(far) * far) > 0  # the mirror image comes back
  stopped = jax.grad(
    lambda x: losses.dgpo_loss(
      error(x)[None], error(OLD)[None], error(REF)[None], bad[None], beta=9.0, clip=0.1
    ).sum()
  )
  assert not stopped(far).any()


def test_where_dgpo_stops():
  err_old = jnp.zeros(4)
  err, advantage = jnp.array([-0.2, 0.2, -0.2, 0.2]), jnp.array([1.0, 1.0, -1.0, -1.0])
  assert dgpo.has_moved(err, err_old, advantage, clip=0.1).tolist() == [
    *(True, False, False, True)
  ]


def test_rwr_with_equal_rewards_is_fine_tuning():
  label = losses.make_loss({"name": "rwr", "beta": 3.0}).label
  np.testing.assert_allclose(label(np.full(5, 0.7))["weight"], 1.0)
  found = gradient(lambda x: losses.rwr_loss(error(x), jnp.ones(6)))
  np.testing.assert_allclose(found, gradient(error), rtol=1e-14)
  unequal = label(np.array([0.0, 1.0]))["weight"]
  np.testing.assert_allclose(unequal[1] / unequal[0], np.exp(3.0))
