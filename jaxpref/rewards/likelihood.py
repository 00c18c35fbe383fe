"""Log-probabilities of a stochastic sampler's steps.

A step of a solver with noise is a Gaussian, whose mean and standard deviation stand in the
solver's own coefficients (`timesteps.Coefficients`). As in published code, a log-probability
is a mean over the latents' elements, not a sum. Steps without noise have the log-probability
0, and a gradient of 0.
"""

import math

import jax
import jax.numpy as jnp

from jaxpref.diffusion.schedule import per_sample
from jaxpref.diffusion.timesteps import Coefficients


def step_at(table: Coefficients, k: jax.Array) -> Coefficients:
  """Returns the coefficients of one step of each sample.

  Args:
    table: of N steps and B samples.
    k: number of each sample's step, int [B].

  Returns:
    `state` [B], `data` [J, B] and `noise` [B].
  """
  samples = jnp.arange(k.shape[0])
  noise = None if table.noise is None else table.noise[k, samples]
  return Coefficients(table.state[k, samples], table.data[k, :, samples].T, noise)


def step_moments(
  step: Coefficients, x_t: jax.Array, x0: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and standard deviation of a step's output.

  Args:
    step: coefficients of one step, as a row of a table or from `step_at`.
    x_t: the step's input, [B, ...].
    x0: the clean latents that the prediction implies, [B, ...].

  Returns:
    The mean [B, ...] and the standard deviation [B].

  Raises:
    ValueError: the solver is not of order 1, so that a step depends on those before it.
  """
  if step.data.shape[0] != 1:
    raise ValueError("a solver of order 1 is needed: ddim or ddpm")
  mean = per_sample(step.state, x_t) * x_t + per_sample(step.data[0], x_t) * x0
  return mean, jnp.zeros_like(step.state) if step.noise is None else step.noise


def gaussian_log_prob(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
  """Computes the mean of the elements' log-densities.

  Args:
    x: the step's output, [B, ...].
    mean: of the step, [B, ...].
    std: of the step, [B]; 0 for a step without noise.

  Returns:
    [B]; 0 where `std` is 0.
  """
  safe = jnp.where(std > 0, std, 1.0)
  density = -_mean_square(x - mean) / (2 * jnp.square(safe)) - jnp.log(safe)
  return jnp.where(std > 0, density - 0.5 * math.log(2 * math.pi), 0.0)


def gaussian_kl(mean: jax.Array, mean_ref: jax.Array, std: jax.Array) -> jax.Array:
  """Computes the divergence of two steps that differ in their means, per element.

  Args:
    mean: of the policy's step, [B, ...].
    mean_ref: of the reference's step, [B, ...].
    std: of both, [B].

  Returns:
    [B]; 0 where `std` is 0.
  """
  safe = jnp.where(std > 0, std, 1.0)
  return jnp.where(std > 0, _mean_square(mean - mean_ref) / (2 * jnp.square(safe)), 0.0)


def ancestral_kl(
  x0: jax.Array, x0_ref: jax.Array, log_snr: jax.Array, log_snr_next: jax.Array
) -> jax.Array:
  """Computes the divergence of two models' steps of ancestral sampling, in nats.

  Such a step (DDPM's; DDIM's with eta = 1) is a Gaussian whose mean depends on the predicted
  clean latents. Its divergence is (SNR_next - SNR) |x0 - x0_ref|^2 / 2, whatever the schedule.
  The divergence of the whole path is the sum of the steps', as the policy reaches them.

  Args:
    x0: the policy's prediction, [B, ...].
    x0_ref: the reference's, for the same state, [B, ...].
    log_snr: of the step's input, [B].
    log_snr_next: of its output, [B]; infinite for clean latents.

  Returns:
    [B]; 0 for a step to clean latents, which has no noise.
  """
  finite = jnp.isfinite(log_snr_next)
  gain = jnp.exp(jnp.where(finite, log_snr_next, 0.0)) - jnp.exp(log_snr)
  squares = jnp.sum(jnp.square(x0 - x0_ref), axis=tuple(range(1, x0.ndim)))
  return jnp.where(finite, 0.5 * gain * squares, 0.0)


def _mean_square(x: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))
