"""Log-probabilities of the sampler's own steps, and gradients through its last ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.diffusion import ddim, ddpm, dpm_solver, sampler, schedule, timesteps
from jaxpref.errors import UserError
from jaxpref.rewards import likelihood, pathwise

SCHEDULE = schedule.make_schedule()
# Of DDIM with eta = 1 and 20 steps of Stable Diffusion 1.5.
SIGMAS = (
  *(0.6444, 0.6241, 0.6029, 0.5807, 0.5576, 0.5336, 0.5087, 0.4829, 0.4565, 0.4293),
  *(0.4016, 0.3732, 0.3442, 0.3144, 0.2836, 0.2509, 0.2144, 0.1673, 0.0406, 0.0206),
)


def grid_of(num_steps, batch, final="sigma_min"):
  return timesteps.uniform_grid(
    *(SCHEDULE, num_steps, batch), steps_offset=1, visit_lowest=True, final=final
  )


def predict(x_t, t):
  """A smooth prediction of no particular model."""
  return jnp.tanh(0.7 * x_t + 1e-3 * schedule.per_sample(t, x_t))


def test_deviations_are_those_of_stable_diffusion():
  table = ddim.coefficients(grid_of(20, 1), eta=1.0)
  np.testing.assert_allclose(table.noise[:, 0], SIGMAS, atol=5e-5)


@jax.jit
def of_step(table, path, after, grid, k):
  """Mean, deviation and log-probability of step k from stored states."""
  step = likelihood.step_at(table, jnp.full(after.shape[1], k))
  clean, _ = schedule.split_at("epsilon", path.predictions[k], path.states[k], grid.log_snr[k])
  mean, std = likelihood.step_moments(step, path.states[k], clean)
  return mean, std, likelihood.gaussian_log_prob(after[k], mean, std)


WINDOW = (0.0, 0.0, 1.0, 1.0, 0.5, 0.0)


@pytest.mark.parametrize(
  ("solver", "eta"),
  [
    ("ddim", WINDOW),
    pytest.param("ddim", 1.0, marks=pytest.mark.long),
    pytest.param("ddpm", 0.0, marks=pytest.mark.long),
  ],
)
def test_log_probabilities_of_stored_states_are_the_samplers(solver, eta):
  """Recomputed from states and steps, against those of the sampler's own noise."""
  batch, shape, steps = 3, (2, 4, 4), 6
  grid, keys = grid_of(steps, batch), jax.random.split(jax.random.key(1), batch)
  noise = sampler.initial_noise(keys, shape)
  x0, path = sampler.sample(
    *(predict, noise, grid, SCHEDULE), solver=solver, eta=eta, key=keys, trajectory=True
  )
  after = jnp.concatenate([path.states[1:], x0[None]])
  table = ddim.coefficients(grid, eta=eta) if solver == "ddim" else ddpm.coefficients(grid)
  for k in range(steps):
    mean, std, found = of_step(table, path, after, grid, k)
    if std[0] == 0:
      assert found.tolist() == [0.0] * batch
      np.testing.assert_allclose(mean, after[k], atol=1e-6)
      continue
    z = np.asarray(sampler.step_noise(keys, k, shape), np.float64)
    want = -np.mean(z**2, axis=(1, 2, 3)) / 2 - np.log(std) - np.log(2 * np.pi) / 2
    np.testing.assert_allclose(found, want, atol=2e-6)


def test_outside_of_a_window_the_path_is_the_deterministic_one():
  keys = jax.random.split(jax.random.key(2), 2)
  noise, grid = sampler.initial_noise(keys, (2, 4, 4)), grid_of(6, 2)
  sample = lambda eta: sampler.sample(  # noqa: E731
    *(predict, noise, grid, SCHEDULE), solver="ddim", eta=eta, key=keys, trajectory=True
  )
  (_, mixed), (_, plain) = sample(WINDOW), sample(0.0)
  np.testing.assert_array_equal(mixed.states[:3], plain.states[:3])  # noise enters in step 2
  assert (mixed.states[3:] != plain.states[3:]).all()
  whole, constant = (ddim.coefficients(grid, eta=e) for e in ((1.0,) * 6, 1.0))
  np.testing.assert_array_equal(whole.noise, constant.noise)


def test_etas_must_be_one_for_each_step():
  with pytest.raises(UserError, match="must have 6 numbers, one for each step"):
    ddim.coefficients(grid_of(6, 1), eta=(1.0, 0.0))
  with pytest.raises(UserError, match="must be in"):
    ddim.coefficients(grid_of(2, 1), eta=(1.0, 1.5))


def test_multistep_solvers_have_no_step_likelihood():
  table = dpm_solver.coefficients(grid_of(4, 1), order=2, lower_order_final=True)
  step = likelihood.step_at(table, jnp.zeros(1, int))
  with pytest.raises(ValueError, match="order 1"):
    likelihood.step_moments(step, jnp.zeros((1, 2)), jnp.zeros((1, 2)))


# ------------------------------------------------------------ gradients of the last steps

# A denoiser that is linear in x makes every sample linear in its noise.
THETA, STEPS = np.array([0.3, 0.6]), 4
NODE, WEIGHT = np.polynomial.hermite_e.hermegauss(12)
WEIGHT = WEIGHT / WEIGHT.sum()


def linear(theta, x_t, t):
  return theta[0] + theta[1] * x_t


def levels(final):
  """Amplitudes of signal and noise at all levels, float64, from the betas."""
  betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
  bar = np.cumprod(1 - betas)[[751, 501, 251, 1]]
  bar = np.append(bar, 1.0 if final == "zero" else 1 - betas[0])
  return np.sqrt(bar), np.sqrt(1 - bar)


def closed_form(first, final="zero", noised=False):
  """The gradient of E[-(x - 1)^2] where the steps before `first` are frozen.

  x = p + q z and dx/dtheta = u + v z, with z the initial noise; E[z] = 0, E[z^2] = 1.
  """
  alpha, sigma = levels(final)
  p, q = 0.0, 1.0
  u, v = np.zeros(2), np.zeros(2)

  def step(k, p, q, u, v, learns):
    scale, share = alpha[k + 1] / alpha[k], sigma[k + 1] - alpha[k + 1] * sigma[k] / alpha[k]
    grown = scale + share * THETA[1]
    u = grown * u + share * learns * np.array([1.0, p])
    v = grown * v + share * learns * np.array([0.0, q])
    return grown * p + share * THETA[0], grown * q, u, v

  for k in range(STEPS):
    p, q, u, v = step(k, p, q, u, v, k >= first)
  if not noised:
    return -2 * ((p - 1) * u + q * v)
  # Noised again with independent noise e: x = p' + q' z + s' e.
  a, s = alpha[STEPS - 1], sigma[STEPS - 1]
  again = [step(STEPS - 1, *start, np.zeros(2), np.zeros(2), True)
           for start in ((a * p, a * q), (a * p, s))]  # fmt: skip
  (p2, q2, u2, v2), (_, s2, _, w2) = again
  return -2 * ((p2 - 1) * u2 + q2 * v2 + s2 * w2)


def expected(sample):
  """The gradient of the expected reward over nodes of the initial noise."""

  def loss(theta):
    x0 = sample(theta, jnp.float32(NODE)[:, None])
    return jnp.sum(jnp.float32(WEIGHT) * -jnp.square(x0[..., 0] - 1.0))

  return jax.jit(jax.grad(loss))(jnp.float32(THETA))


@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_gradient_through_the_last_steps_is_the_closed_form(last):
  grid = grid_of(STEPS, len(NODE), final="zero")
  found = expected(
    lambda theta, z: pathwise.sample_last(linear, theta, z, grid, SCHEDULE, last=last)
  )
  np.testing.assert_allclose(found, closed_form(STEPS - last), rtol=2e-4)
  others = [closed_form(STEPS - k) for k in (1, 2, 4) if k != last]
  assert all(np.abs(found - other).max() > 0.01 for other in others)


@pytest.mark.long
def test_the_sample_itself_is_the_samplers():
  grid = grid_of(STEPS, len(NODE))
  z = jnp.float32(NODE)[:, None]
  want = sampler.sample(lambda x, t: linear(THETA, x, t), z, grid, SCHEDULE, solver="ddim")
  for last in (1, STEPS):
    got = pathwise.sample_last(linear, THETA, z, grid, SCHEDULE, last=last)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  with pytest.raises(ValueError, match="between 1 and 4"):
    pathwise.sample_last(linear, THETA, z, grid, SCHEDULE, last=5)


def test_denoising_again_has_the_closed_forms_gradient():
  """Nodes of both noises: all pairs of initial and new noise."""
  grid, many = grid_of(STEPS, len(NODE), final="zero"), len(NODE)
  noise = jnp.broadcast_to(jnp.float32(NODE)[:, None, None], (many, many, 1))

  def loss(theta):
    z = jnp.float32(NODE)[:, None]
    x0 = pathwise.sample_renoised(linear, theta, z, grid, SCHEDULE, noise)
    values = -jnp.square(x0[..., 0] - 1.0)
    return jnp.sum(jnp.float32(WEIGHT)[:, None] * jnp.float32(WEIGHT) * values)

  found = jax.jit(jax.grad(loss))(jnp.float32(THETA))
  np.testing.assert_allclose(found, closed_form(STEPS, noised=True), rtol=2e-4)


@pytest.mark.parametrize("step", [1, 3])
def test_a_prediction_inside_of_the_path_learns_at_its_own_step(step):
  grid, z = grid_of(STEPS, len(NODE), final="zero"), jnp.float32(NODE)[:, None]
  _, path = sampler.sample(
    *(lambda x, t: linear(THETA, x, t), z, grid, SCHEDULE), solver="ddim", trajectory=True
  )
  alpha, sigma = (of[step] for of in levels("zero"))
  x_t = np.asarray(path.states[step], np.float64)
  x0 = (x_t - sigma * (THETA[0] + THETA[1] * x_t)) / alpha
  predict_at = jax.jit(
    lambda theta, k: pathwise.predict_at(linear, theta, z, grid, SCHEDULE, k)
  )
  np.testing.assert_allclose(predict_at(THETA, step), x0, rtol=1e-4, atol=1e-5)
  found = jax.grad(lambda theta: predict_at(theta, step).sum())(jnp.float32(THETA))
  want = [-sigma / alpha * len(NODE), -sigma / alpha * x_t.sum()]
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
