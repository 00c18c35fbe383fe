"""The noise schedule against float64 numpy and, at a few points, against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.diffusion import schedule as schedules
from jaxpref.errors import UserError

SHAPE = (4, 3, 5)
T = np.array([0, 1, 500, 999])


def _alpha_bar_64(name):
  """alpha_bar [1000] by the papers' definitions, in float64."""
  if name == "squaredcos_cap_v2":
    f = [np.cos((i / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(1001)]
    beta = np.array([min(1 - b / a, 0.999) for a, b in zip(f, f[1:], strict=False)])
  elif name == "linear":
    beta = np.linspace(1e-4, 0.02, 1000)
  else:
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  return np.cumprod(1 - beta)


def _make(name, prediction_type="epsilon"):
  start, end = (1e-4, 0.02) if name == "linear" else (0.00085, 0.012)
  return schedules.make_schedule(
    beta_schedule=name, beta_start=start, beta_end=end, prediction_type=prediction_type
  )


@pytest.fixture
def data():
  rng = np.random.default_rng(0)
  return rng.standard_normal(SHAPE), rng.standard_normal(SHAPE)


@pytest.mark.parametrize("name", schedules.BETA_SCHEDULES)
def test_levels_match_float64(name):
  schedule, expected = _make(name), _alpha_bar_64(name)
  np.testing.assert_allclose(schedule.alpha_bar, expected, rtol=3e-6)
  alpha, sigma = schedules.scales(schedule.log_snr)
  np.testing.assert_allclose(alpha, np.sqrt(expected), rtol=3e-6)
  # The point of log-SNR: 1 - alpha_bar keeps its relative precision near alpha_bar = 1.
  np.testing.assert_allclose(sigma, np.sqrt(1 - expected), rtol=3e-6)
  assert schedule.num_timesteps == 1000


def test_stable_diffusion_numbers():
  # PyTorch diffusers 0.39: DDIMScheduler(scaled_linear, 0.00085, 0.012).alphas_cumprod.
  values = schedules.make_schedule().alpha_bar[jnp.array([0, 250, 500, 999])]
  np.testing.assert_allclose(
    values, [0.99914998, 0.67379230, 0.27633247, 0.00466010], rtol=4e-6
  )


@pytest.mark.parametrize("name", schedules.BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", schedules.PREDICTION_TYPES)
def test_noising_target_and_split(name, prediction_type, data):
  x0, eps = data
  schedule = _make(name, prediction_type)
  alpha_bar = _alpha_bar_64(name)[T].reshape(4, 1, 1)
  alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
  args = jnp.asarray(x0), jnp.asarray(eps), jnp.asarray(T)

  x_t = schedules.add_noise(schedule, *args)
  np.testing.assert_allclose(x_t, alpha * x0 + sigma * eps, atol=2e-6)
  target = schedules.target(schedule, *args)
  v = alpha * eps - sigma * x0
  np.testing.assert_allclose(target, eps if prediction_type == "epsilon" else v, atol=2e-6)

  x0_back, eps_back = schedules.split_prediction(schedule, target, x_t, args[2])
  # Reading x0 off an epsilon prediction divides float32 rounding by alpha.
  slack = 1 / alpha if prediction_type == "epsilon" else 1.0
  assert np.all(np.abs(x0_back - x0) < 2e-6 * slack)
  np.testing.assert_allclose(eps_back, eps, atol=3e-6)


def test_outputs_are_float32_for_low_precision_latents(data):
  x0, eps = (jnp.asarray(a, jnp.bfloat16) for a in data)
  schedule = _make("scaled_linear", "v_prediction")
  assert schedules.add_noise(schedule, x0, eps, jnp.asarray(T)).dtype == jnp.float32
  assert schedules.target(schedule, x0, eps, jnp.asarray(T)).dtype == jnp.float32


def test_denoising_error_is_a_float32_mean():
  rng = np.random.default_rng(1)
  a, b = rng.standard_normal((2, 3, 4, 8, 8))
  error = schedules.denoising_error(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(error, ((a - b) ** 2).mean(axis=(1, 2, 3)), rtol=1e-6)

  # 256 + 0.5 is not a bfloat16 number: the difference must not be rounded to one.
  prediction = jnp.full((1, 4), 256.0, jnp.bfloat16)
  error = schedules.denoising_error(prediction, jnp.full((1, 4), -0.5, jnp.bfloat16))
  assert error.dtype == jnp.float32
  assert error[0] == 256.5**2


def test_config_of_stable_diffusion():
  config = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
  }
  schedule = schedules.schedule_from_config(config)
  np.testing.assert_array_equal(schedule.log_snr, _make("scaled_linear").log_snr)
  v = schedules.schedule_from_config(config | {"prediction_type": "v_prediction"})
  assert v.prediction_type == "v_prediction"
  # What the file leaves out is diffusers' default: linear, 1e-4 to 0.02, 1000, epsilon.
  np.testing.assert_array_equal(
    schedules.schedule_from_config({}).log_snr, _make("linear").log_snr
  )


def test_config_with_trained_betas_and_zero_snr():
  betas = [0.1, 0.2, 0.5]
  schedule = schedules.schedule_from_config({"trained_betas": betas})
  np.testing.assert_allclose(schedule.alpha_bar, [0.9, 0.72, 0.36], rtol=1e-6)
  zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
  stable_diffusion = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
  }
  zero = schedules.schedule_from_config(stable_diffusion | zero_snr)
  assert zero.alpha_bar[-1] == pytest.approx(2.0**-24, rel=1e-5)
  assert zero.alpha_bar[0] == pytest.approx(1 - 0.00085, rel=1e-6)
  # On diffusers' default betas 2**-24 would lie above the level before it.
  for schedule in (zero, schedules.schedule_from_config(zero_snr)):
    assert np.all(np.diff(schedule.log_snr) < 0)


@pytest.mark.parametrize(
  ("config", "named"),
  [
    ({"prediction_type": "sample"}, "prediction_type"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule"),
    ({"beta_start": -1}, "beta_start"),
    ({"beta_end": "big"}, "beta_end"),
    ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ({"trained_betas": [0.1, 2.0]}, "beta"),
    ({"trained_betas": "x"}, "trained_betas"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ({"thresholding": True}, "thresholding"),
    ({"clip_sample": True}, "clip_sample"),
    ({"variance_type": "learned_range"}, "variance_type"),
    ({"_class_name": "EDMEulerScheduler"}, "EDM"),
  ],
)
def test_unsupported_config_names_the_field(config, named):
  with pytest.raises(UserError, match=named):
    schedules.schedule_from_config(config)


def test_a_schedule_is_a_pytree_that_keeps_its_type():
  schedule = _make("linear", "v_prediction")
  again = jax.jit(lambda s: s)(schedule)
  assert again.prediction_type == "v_prediction"
  np.testing.assert_array_equal(again.log_snr, schedule.log_snr)
