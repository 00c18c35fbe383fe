"""Schedules, clipping and the moving average against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import live

from jaxpref.training import optimizer as optimizer_lib


def _values(name, steps, **kwargs):
  schedule = optimizer_lib.make_schedule(name, lr=1.0, num_updates=10, **kwargs)
  return np.array([float(schedule(i)) for i in steps])


def test_constant_after_warmup():
  np.testing.assert_allclose(
    _values("constant", range(6), warmup_updates=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
  )
  np.testing.assert_allclose(_values("constant", [0, 9], warmup_updates=0), [1.0, 1.0])


def test_linear_cosine_and_trapezoid_end_at_zero():
  np.testing.assert_allclose(_values("linear", [0, 5, 10], warmup_updates=0), [1.0, 0.5, 0.0])
  np.testing.assert_allclose(
    _values("cosine", [0, 5, 10], warmup_updates=0), [1.0, 0.5, 0.0], atol=1e-7
  )
  np.testing.assert_allclose(
    _values("trapezoid", [0, 8, 9, 10], warmup_updates=0, decay=0.2), [1.0, 1.0, 0.5, 0.0]
  )
  np.testing.assert_allclose(
    _values("trapezoid", [0, 1, 2, 8, 9, 10], warmup_updates=2, decay=0.2),
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.0],
  )


def test_unknown_schedule():
  with pytest.raises(ValueError, match="nosuch"):
    _values("nosuch", [0], warmup_updates=0)


def test_clipping_bounds_the_norm_that_adam_sees():
  # Adam's first update is lr * sign(g) whatever g's size, so look at its first moment.
  schedule = optimizer_lib.make_schedule("constant", lr=0.1, warmup_updates=0, num_updates=1)
  params = {"w": jnp.zeros(2)}
  gradient = {"w": jnp.array([30.0, 40.0])}
  for clip, want in ((1.0, [0.06, 0.08]), (None, [3.0, 4.0])):
    tx = optimizer_lib.make_optimizer(schedule, clip_norm=clip, weight_decay=0.0)
    _, state = tx.update(gradient, tx.init(params), params)
    moments = [s.mu["w"] for s in _leaves_with_mu(state)]
    np.testing.assert_allclose(moments[0], want, rtol=1e-6)


def test_it_is_optax_adamw():
  schedule = optimizer_lib.make_schedule("cosine", lr=0.1, warmup_updates=2, num_updates=9)
  options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
  ours = optimizer_lib.make_optimizer(schedule, **options, clip_norm=2.0)
  theirs = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(schedule, **options))
  params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1])}
  states = [tx.init(params) for tx in (ours, theirs)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  both = [params, params]
  for seed in range(9):
    keys = jax.random.split(jax.random.key(seed), 2)
    gradient = jax.tree.map(
      lambda p, k: jax.random.normal(k, p.shape), params, {"w": keys[0], "b": keys[1]}
    )
    for i, tx in enumerate((ours, theirs)):
      updates, states[i] = jax.jit(tx.update)(gradient, states[i], both[i])
      both[i] = optax.apply_updates(both[i], updates)
  assert np.abs(both[0]["w"] - params["w"]).min() > 0.05
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *both)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *states)


def _leaves_with_mu(state):
  if hasattr(state, "mu"):
    return [state]
  return [s for part in state if isinstance(part, tuple) for s in _leaves_with_mu(part)]


def test_ema_ramp():
  ema, params = {"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}
  # The first update replaces the average; the second keeps (1 + 1) / (10 + 1) of it.
  for update, decay, want in ((0, 0.9999, 1.0), (1, 0.9999, 9 / 11), (10**7, 0.9, 0.1)):
    got = optimizer_lib.update_ema(ema, params, jnp.int32(update), decay=decay)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)


@live
@pytest.mark.parametrize(("decay", "first"), [(0.9999, 0), (0.7, 0), (0.9999, 90_000)])
def test_ema_is_that_of_diffusers(decay, first):
  """Fifty updates of the same parameters: the ramp, and its limit from there on."""
  import torch
  from diffusers.training_utils import EMAModel

  series = np.random.default_rng(0).normal(size=(51, 3)).astype(np.float32)
  weights = torch.nn.Parameter(torch.tensor(series[0]))
  theirs = EMAModel([weights], decay=decay)
  theirs.optimization_step = first
  ema = jnp.asarray(series[0])
  for i, params in enumerate(series[1:]):
    weights.data = torch.tensor(params)
    theirs.step([weights])
    ema = optimizer_lib.update_ema(ema, jnp.asarray(params), jnp.int32(first + i), decay=decay)
    np.testing.assert_allclose(ema, theirs.shadow_params[0].numpy(), rtol=1e-5, atol=1e-6)
  assert (theirs.cur_decay_value == decay) == (first > 0 or decay < 0.8)


@live
def test_linear_schedule_is_that_of_diffusers():
  """The whole warm-up is one update ahead of theirs, whose first update has a rate of 0."""
  import torch
  from diffusers.optimization import get_scheduler

  weights = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([weights], lr=2e-5)
  scheduler = get_scheduler("linear", optimizer, num_warmup_steps=200, num_training_steps=500)
  theirs = []
  for _ in range(500):
    theirs.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    scheduler.step()
  ours = optimizer_lib.make_schedule("linear", lr=2e-5, warmup_updates=200, num_updates=500)
  ours = np.asarray(jax.vmap(ours)(jnp.arange(500)))
  np.testing.assert_allclose(ours[:200], theirs[1:201], rtol=1e-4)
  np.testing.assert_allclose(ours[200:], theirs[200:], rtol=1e-4)
