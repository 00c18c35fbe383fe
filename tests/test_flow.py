"""Flow matching against diffusers, numpy float64 and closed-form distributions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live
from golden import make_flow as golden
from golden import make_samplers
from scipy import stats

from jaxpref.diffusion import flow, levels
from jaxpref.diffusion import sampler as samplers
from jaxpref.diffusion import schedule as schedules
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError

SD3, SANA, FLUX_DEV = golden.SD3, golden.SANA, golden.FLUX_DEV
SHIFTED = flow.FlowSchedule(shift=3.0)


def _grid(name, batch=golden.SHAPE[0]):
  config, steps, order = golden.CASES[name]
  schedule = schedules.schedule_from_config(config)
  spacing = "trailing" if name.startswith("flux") else "linspace"
  options = {"spacing": spacing, "visit_lowest": order == "euler", "tokens": golden.TOKENS}
  return schedule, timesteps_lib.uniform_grid(schedule, steps, batch, **options)


@functools.partial(jax.jit, static_argnames=("order", "schedule"))
def _states(x_T, levels, schedule, order):
  def denoise(x_t, t):
    mixing = jnp.asarray(golden.MIXING)
    return make_samplers.denoise(x_t, t.reshape(-1, 1, 1), jnp.tanh, mixing)

  x0, seen = samplers.sample(denoise, x_T, levels, schedule, order=order, trajectory=True)
  return jnp.concatenate([seen.states, x0[None]])


def _assert_same(name, inputs, sigmas, states):
  schedule, grid = _grid(name)
  given = schedules.timestep_input(schedule, grid.timesteps[:, 0])
  if schedule.inputs == "truncated":
    np.testing.assert_array_equal(given, inputs)
  np.testing.assert_allclose(given, inputs, rtol=2e-7)
  np.testing.assert_allclose(grid.timesteps[:, 0], sigmas[:-1], rtol=2e-7)
  np.testing.assert_allclose(jax.nn.sigmoid(-0.5 * grid.log_snr[:, 0]), sigmas, rtol=1e-6)
  order = golden.CASES[name][2]
  ours = _states(golden.start(name), grid, schedule, 1 if order == "euler" else order)
  size = np.abs(states).max(axis=(1, 2, 3))
  assert np.all(np.abs(ours - states).max(axis=(1, 2, 3)) < 4e-6 * size)


@pytest.mark.parametrize("name", golden.CASES)
def test_trajectory_matches_golden_numbers(name):
  with np.load(golden.PATH) as stored:
    _assert_same(name, *(stored[f"{name}/{key}"] for key in ("inputs", "sigmas", "states")))


@live
@pytest.mark.long
@pytest.mark.parametrize("name", golden.CASES)
def test_trajectory_matches_diffusers_live(name):
  _assert_same(name, *golden.run_diffusers(name))


def test_published_levels():
  """The numbers that the three families' pipelines visit, written out."""
  sd3 = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707279, 0.602151, 0.464876, 0.278049]
  sd3 += [0.008929]  # the shift acts twice on the lower end
  sana = [0.999666, 0.963941, 0.922722, 0.874635, 0.81781, 0.749625, 0.666296, 0.562148]
  sana += [0.428265, 0.249792]
  wanted = {"sd3": sd3, "sana": sana, "flux_dev": [1, 0.90453, 0.75951, 0.51284]}
  wanted["flux_schnell"] = [1, 0.75, 0.5, 0.25]
  for name, numbers in wanted.items():
    np.testing.assert_allclose(_grid(name)[1].timesteps[:, 0], numbers, atol=6e-6)
  dynamic = schedules.schedule_from_config(FLUX_DEV)
  assert dynamic.sampling_shift(1024) == pytest.approx(math.exp(0.63), rel=1e-6)
  assert dynamic.sampling_shift(4096) == pytest.approx(3.158, abs=5e-4)
  assert dynamic.shift == 1  # of training levels
  assert timesteps_lib.image_tokens((16, 128, 128)) == 4096


@live
@pytest.mark.long
def test_truncated_inputs_are_those_of_diffusers():
  import diffusers

  theirs = diffusers.DPMSolverMultistepScheduler.from_config(SANA)
  ours = schedules.schedule_from_config(SANA)
  for steps in (1, 2, 5, 10, 14, 20, 28, 50, 99):
    theirs.set_timesteps(steps)
    found = timesteps_lib.uniform_grid(ours, steps, 1, spacing="linspace").timesteps[:, 0]
    np.testing.assert_array_equal(schedules.timestep_input(ours, found), theirs.timesteps)


def test_noising_target_and_split():
  rng = np.random.default_rng(0)
  x0, eps = rng.standard_normal((2, 4, 3, 5))
  sigma = np.array([0.0, 1e-3, 0.6, 1.0])
  t, column = jnp.asarray(sigma, jnp.float32), sigma[:, None, None]
  x_t = schedules.add_noise(SHIFTED, jnp.asarray(x0), jnp.asarray(eps), t)
  np.testing.assert_allclose(x_t, (1 - column) * x0 + column * eps, atol=1e-6)
  v = schedules.target(SHIFTED, jnp.asarray(x0), jnp.asarray(eps), t)
  np.testing.assert_allclose(v, eps - x0, atol=1e-6)
  for found, wanted in zip(
    schedules.split_prediction(SHIFTED, v, x_t, t), (x0, eps), strict=True
  ):
    np.testing.assert_allclose(found, wanted, atol=2e-6)
  assert schedules.timestep_input(SHIFTED, t).tolist() == pytest.approx([0, 1, 600, 1000])
  as_sigma = dataclasses.replace(SHIFTED, inputs="sigma")
  np.testing.assert_array_equal(schedules.timestep_input(as_sigma, t), t)
  assert jax.tree.leaves(SHIFTED) == []  # programs do not take it as an input


def _offset_levels(num_steps, offsets):
  u = (num_steps - 1 - np.arange(num_steps)[:, None] + np.asarray(offsets)) / num_steps
  return 3 * u / (1 + 2 * u)


def test_euler_is_order_1_also_from_pure_noise():
  """Against x += (sigma' - sigma) v in float64, on each sample's own levels."""
  offsets = jnp.array([1.0, 0.37])  # 1: the first level is sigma = 1, of log-SNR -inf
  grid = timesteps_lib.offset_grid(SHIFTED, 7, offsets)
  sigma = _offset_levels(7, offsets)
  np.testing.assert_allclose(grid.timesteps, sigma, rtol=1e-6)
  assert grid.log_snr[0, 0] == -np.inf and np.isfinite(grid.log_snr[0, 1])
  assert np.all(np.isposinf(grid.log_snr[-1]))
  x_T = golden.start("sd3")
  found = _states(x_T, grid, SHIFTED, 1)
  x, ends = x_T.astype(np.float64), np.append(sigma, [[0.0, 0.0]], axis=0)
  for k in range(7):
    np.testing.assert_allclose(found[k], x, rtol=2e-5, atol=2e-6)
    here, there = (ends[i][:, None, None] for i in (k, k + 1))
    v = make_samplers.denoise(x, 1000 * here, np.tanh, golden.MIXING.astype(np.float64))
    x = x + (there - here) * v
  np.testing.assert_allclose(found[7], x, rtol=2e-5, atol=2e-6)


MEAN, STD = 0.7, 0.5


def test_orders_converge_to_the_exact_flow():
  """Data of a normal distribution, whose velocity and trajectories are known."""

  @functools.partial(jax.jit, static_argnames=("steps", "order"))
  def run(x_T, steps, order):
    grid = timesteps_lib.uniform_grid(SHIFTED, steps, 3, spacing="trailing")

    def denoise(x_t, t):
      s = t[:, None] / 1000
      x0 = MEAN + (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2) * (x_t - (1 - s) * MEAN)
      # eps - x0 of the posterior's mean; at s = 1 it is x_t - MEAN.
      return (x_t - x0) / s

    return samplers.sample(denoise, x_T, grid, SHIFTED, order=order)

  x_T = jnp.array([[-1.5], [0.3], [1.1]])
  exact = MEAN + STD * np.asarray(x_T)  # (x - (1 - s) MEAN) / its std never changes
  errors = {
    (order, steps): np.abs(np.asarray(run(x_T, steps, order)) - exact).max()
    for order in (1, 2, 3)
    for steps in (20, 40)
  }
  assert errors[1, 20] / errors[1, 40] == pytest.approx(2, rel=0.15)
  # The first long steps in log-SNR, and its halved quadratic term, cost order 3 its lead here.
  for order, falls in ((2, 3.0), (3, 2.2)):
    assert errors[order, 20] / errors[order, 40] > falls, errors
    assert errors[order, 40] < 0.2 * errors[1, 40], errors


def test_offsets_train_every_level_alike():
  offsets = timesteps_lib.sample_offsets(SHIFTED, 10, jax.random.key(0), 2000)
  assert offsets.min() > 0 and offsets.max() <= 1
  grid = timesteps_lib.offset_grid(SHIFTED, 10, offsets)
  assert grid.timesteps.dtype == jnp.float32 and grid.is_flow
  np.testing.assert_allclose(grid.timesteps, _offset_levels(10, offsets), rtol=2e-6)
  assert np.all(np.diff(grid.log_snr, axis=0) > 0)
  # One level of each sample, at a random step as in rollouts, is uniform before the shift.
  pick = np.random.default_rng(0).integers(10, size=2000)
  sigma = np.asarray(grid.timesteps, np.float64)[pick, np.arange(2000)]
  assert stats.kstest(sigma / (3 - 2 * sigma), "uniform").pvalue > 0.01
  whole = timesteps_lib.sample_offsets(schedules.make_schedule(), 20, jax.random.key(0), 9)
  assert whole.dtype == jnp.int32 and whole.max() < 50


def _unshifted(sigma, shift=3.0):
  return sigma / (shift - (shift - 1) * sigma)


def _mode_cdf(sigma, scale):
  """P(u <= level) for u = 1 - r - scale (cos^2(pi r / 2) - 1 + r), which falls with r."""

  r = np.linspace(1, 0, 100_001)
  level = 1 - r - scale * (np.cos(np.pi * r / 2) ** 2 - 1 + r)
  return 1 - np.interp(_unshifted(sigma), level, r)


DENSITIES = {
  "uniform": (flow.Density(), _unshifted),
  "logit_normal": (
    flow.Density("logit_normal", mean=-0.4, std=0.8),
    lambda s: stats.norm.cdf((np.log(_unshifted(s)) - np.log1p(-_unshifted(s)) + 0.4) / 0.8),
  ),
  "mode": (flow.Density("mode", scale=1.29), lambda s: _mode_cdf(s, 1.29)),
  "mode, ends": (flow.Density("mode", scale=-0.8), lambda s: _mode_cdf(s, -0.8)),
}


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.long] * ("," in n)) for n in DENSITIES]
)
def test_levels_have_the_density(name):
  density, cdf = DENSITIES[name]
  schedule = levels.training_schedule(SHIFTED, density)
  sigma = np.asarray(levels.sample_levels(schedule, jax.random.key(1), (3000,)), np.float64)
  assert sigma.min() >= 0 and sigma.max() <= 1
  assert stats.kstest(sigma, cdf).pvalue > 0.01
  # Quantiles, which pretraining spreads over a batch.
  share = np.array([0.01, 0.3, 0.5, 0.9])
  found = np.asarray(levels.level_at(schedule, jnp.asarray(share, jnp.float32)), np.float64)
  np.testing.assert_allclose(cdf(found), share, atol=2e-6)
  # The test tells densities apart: without the shift it fails.
  plain = np.asarray(
    levels.sample_levels(dataclasses.replace(schedule, shift=1.0), jax.random.key(1), (3000,))
  )
  assert stats.kstest(plain, cdf).pvalue < 1e-6


def test_settings_of_levels():
  plain = flow.FlowSchedule(shift=3.0, dynamic=flow.DynamicShift())
  made = levels.training_schedule(plain, flow.Density("mode"), shift=2.0)
  assert (made.shift, made.dynamic, made.density.name) == (2.0, None, "mode")
  assert levels.training_schedule(plain, flow.Density()) == plain
  other = schedules.make_schedule()
  assert levels.training_schedule(other, flow.Density()) is other
  for schedule, density, shift, message in (
    (plain, flow.Density("cosine"), 0.0, "noise.density must be one of uniform"),
    (plain, flow.Density(mean=1.0), 0.0, "noise.mean has no effect"),
    (plain, flow.Density("logit_normal", scale=0.5), 0.0, "noise.scale has no effect"),
    (other, flow.Density("mode"), 0.0, "noise.density is for models of flow matching"),
    (other, flow.Density(), 3.0, "noise.shift is for models of flow matching"),
  ):
    with pytest.raises(UserError, match=message):
      levels.training_schedule(schedule, density, shift=shift)


SPACES = {
  "flow": SHIFTED,
  "epsilon": schedules.make_schedule(),
  "v": schedules.make_schedule(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", SPACES)
def test_errors_in_the_three_spaces_differ_by_their_factors(name):
  """The errors of what predictions imply, against the factor times the model's own errors."""
  schedule = SPACES[name]
  t = jnp.array([0.05, 0.5, 0.97]) if name == "flow" else jnp.array([20, 500, 930])
  rng = np.random.default_rng(2)
  x0, eps, wrong = (jnp.asarray(x) for x in rng.standard_normal((3, 3, 4, 4)))
  x_t = schedules.add_noise(schedule, x0, eps, t)
  prediction = schedules.target(schedule, x0, eps, t) + 0.3 * wrong
  own = schedules.denoising_error(prediction, schedules.target(schedule, x0, eps, t))
  x0_hat, eps_hat = schedules.split_prediction(schedule, prediction, x_t, t)
  if name == "flow":
    alpha, sigma = 1 - t, t
    v, v_hat = eps - x0, eps_hat - x0_hat
  else:
    alpha, sigma = schedules.scales(schedule.log_snr[t])
    a, s = alpha[:, None, None], sigma[:, None, None]
    v, v_hat = a * eps - s * x0, a * eps_hat - s * x0_hat
  pairs = {"v": (v_hat, v), "eps": (eps_hat, eps), "x0": (x0_hat, x0)}
  exact = {"v": 1.0, "eps": alpha**2, "x0": sigma**2}
  for space, (found, true) in pairs.items():
    scale = schedules.error_scale(schedule, space, t)
    factor = 1.0 if scale is None else scale**2
    np.testing.assert_allclose(schedules.denoising_error(found, true), factor * own, rtol=2e-3)
    of_own = exact["eps"] if name == "epsilon" else 1.0
    np.testing.assert_allclose(jnp.broadcast_to(factor, 3), exact[space] / of_own, rtol=1e-5)
  assert schedules.error_scale(schedule, "model", t) is None


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler"),
    (SANA | {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
    (SANA | {"use_flow_sigmas": False}, "use_flow_sigmas"),
    (SANA | {"prediction_type": "epsilon"}, "prediction_type"),
    (SANA | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    (SANA | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    (SANA | {"flow_shift": 0}, "flow_shift"),
    (SD3 | {"shift": "3"}, "shift"),
    (SD3 | {"shift": math.inf}, "shift"),
    (SD3 | {"num_train_timesteps": 0}, "num_train_timesteps"),
    (SD3 | {"invert_sigmas": True}, "invert_sigmas"),
    (SD3 | {"shift_terminal": 0.1}, "shift_terminal"),
    (SD3 | {"use_karras_sigmas": True}, "use_karras_sigmas"),
    (SD3 | {"use_beta_sigmas": True}, "use_beta_sigmas"),
    (SD3 | {"stochastic_sampling": True}, "stochastic_sampling"),
    (FLUX_DEV | {"time_shift_type": "linear"}, "time_shift_type"),
    (FLUX_DEV | {"base_shift": "a"}, "base_shift"),
    (FLUX_DEV | {"max_image_seq_len": 256}, "max_image_seq_len"),
  ],
)
def test_unsupported_config_names_the_field(config, named):
  with pytest.raises(UserError, match=named):
    schedules.schedule_from_config(config)


def test_bad_requests_are_user_errors():
  for options in ({"spacing": "leading"}, {"spacing": "linspace", "karras": True}):
    with pytest.raises(UserError, match="spacings linspace and trailing"):
      timesteps_lib.uniform_grid(SHIFTED, 5, 1, **options)
  for make in (timesteps_lib.uniform_grid, timesteps_lib.offset_grid):
    with pytest.raises(UserError, match="sampling steps"):
      make(SHIFTED, 0, jnp.zeros(1))
  grid = timesteps_lib.uniform_grid(SHIFTED, 5, 1, spacing="trailing")
  for solver in ("ddim", "ddpm"):
    with pytest.raises(UserError, match=f"the solver {solver} is for variance-preserving"):
      samplers.sample(lambda x, t: x, jnp.zeros((1, 2)), grid, SHIFTED, solver=solver)
  dynamic = schedules.schedule_from_config(FLUX_DEV)
  with pytest.raises(ValueError, match="image tokens"):
    timesteps_lib.uniform_grid(dynamic, 5, 1, spacing="trailing")
