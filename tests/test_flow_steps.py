"""Stochastic steps of a flow: marginals of Gaussian data, whose velocity is known exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.diffusion import flow_steps
from jaxpref.rewards import likelihood

MEAN, SPREAD = 0.7, 0.4  # of the data


pytestmark = pytest.mark.usefixtures("in_float64")


def marginal(s):
  return (1 - s) * MEAN, ((1 - s) * SPREAD) ** 2 + s**2


def velocity(x, s):
  """E[noise - data given x], of jointly Gaussian variables."""
  mean, variance = marginal(s)
  return -MEAN + (s - (1 - s) * SPREAD**2) / variance * (x - mean)


def one(moments, x, s, s_next, *more, **options):
  """A step of states [N]."""
  full = lambda of: jnp.full(len(x), of)  # noqa: E731
  mean, std = moments(
    *(x[:, None], velocity(x, s)[:, None], full(s), full(s_next), *map(full, more)), **options
  )
  return mean[:, 0], std


NODE, WEIGHT = np.polynomial.hermite_e.hermegauss(10)
WEIGHT = WEIGHT / WEIGHT.sum()


def error_of_marginal(g, size, s=0.6):
  """How far mean and variance after one step are from the flow's own marginal."""
  mean, variance = marginal(s)
  x = jnp.asarray(mean + np.sqrt(variance) * NODE)
  after, std = one(flow_steps.sde_moments, x, s, s - size, g)
  found = WEIGHT @ after, WEIGHT @ (after - WEIGHT @ after) ** 2 + std[0] ** 2
  return np.abs(np.subtract(found, marginal(s - size))).max()


LONG = pytest.mark.long


@pytest.mark.parametrize("g", [0.3, *(pytest.param(g, marks=LONG) for g in (0.0, 1.2))])
def test_noise_keeps_the_flows_marginals(g):
  """An Euler step's error falls with the square of its size, for any noise."""
  coarse, fine = (error_of_marginal(g, size) for size in (1e-2, 5e-3))
  assert coarse < 1e-3
  assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_a_wrong_drift_would_show():
  right = flow_steps.sde_moments

  def without_score(x, v, s, s_next, g):
    return right(x, v, s, s_next, 0 * g)[0], right(x, v, s, s_next, g)[1]

  mean, variance = marginal(0.6)
  x = jnp.asarray(mean + np.sqrt(variance) * NODE)
  after, std = one(without_score, x, 0.6, 0.59, 1.2)
  found = WEIGHT @ (after - WEIGHT @ after) ** 2 + std[0] ** 2
  assert abs(found - marginal(0.59)[1]) > 1e-2


def test_the_means_are_those_of_the_published_forms():
  x, s, s_next = jnp.array([0.3, -1.1]), 0.6, 0.5
  v, ds = velocity(x, s), s_next - s
  g = float(flow_steps.flow_sde_noise(jnp.array(s), 0.9))
  assert g == pytest.approx(0.7 * np.sqrt(0.6 / 0.4))
  mean, std = one(flow_steps.sde_moments, x, s, s_next, g)
  want = x * (1 + g**2 / (2 * s) * ds) + v * (1 + g**2 * (1 - s) / (2 * s)) * ds
  np.testing.assert_allclose(mean, want, rtol=1e-12)
  np.testing.assert_allclose(std, g * np.sqrt(-ds), rtol=1e-12)
  mean, std = one(flow_steps.sde_moments, x, s, s_next, 0.3)
  clean = x - s * v
  score = -(x - (1 - s) * clean) / s**2
  np.testing.assert_allclose(mean, x + v * ds - 0.045 * score * ds, rtol=1e-12)
  np.testing.assert_allclose(std, 0.3 * np.sqrt(-ds), rtol=1e-12)


def test_the_first_level_has_the_seconds_noise():
  g = flow_steps.flow_sde_noise(jnp.array([1.0, 0.9, 0.5]), 0.9)
  np.testing.assert_allclose(g, [2.1, 2.1, 0.7], rtol=1e-12)


def test_preserving_steps_keep_signal_and_noise():
  x, s, s_next = jnp.array([0.3, -1.1]), 0.6, 0.5
  plain, std = one(flow_steps.preserving_moments, x, s, s_next, a=0.0)
  np.testing.assert_allclose(plain, x + velocity(x, s) * (s_next - s), rtol=1e-12)
  assert (std == 0).all()
  mean, std = one(flow_steps.preserving_moments, x, s, s_next)
  np.testing.assert_allclose(std, s_next * np.sin(0.4 * np.pi), rtol=1e-12)
  clean, noise = x - s * velocity(x, s), x + (1 - s) * velocity(x, s)
  kept = np.sqrt(s_next**2 - std**2)
  np.testing.assert_allclose(mean, (1 - s_next) * clean + kept * noise, rtol=1e-12)


def test_without_noise_all_steps_are_the_flows_own():
  x = jnp.array([0.3, -1.1])
  mean, std = one(flow_steps.sde_moments, x, 0.6, 0.5, 0.0)
  np.testing.assert_allclose(mean, x - 0.1 * velocity(x, 0.6), rtol=1e-12)
  assert (likelihood.gaussian_log_prob(mean[:, None], mean[:, None], std) == 0).all()
