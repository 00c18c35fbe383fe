"""Stochastic steps of a rectified flow, and their means and standard deviations.

A flow's sampler is deterministic. With g the density of added noise, the stochastic process

  dx = (v - g^2 / 2 score) ds + g dw,   score = -(x + (1 - s) v) / s

from s = 1 to 0 has the same marginals (Song et al. 2021, arXiv 2011.13456). Published methods
take an Euler step of it, and differ in g. Coefficient-preserving sampling splits the state into
the clean image and the noise that the prediction implies, and replaces a part of that noise.
"""

import math

import jax
import jax.numpy as jnp

from jaxpref.diffusion.schedule import per_sample


def flow_sde_noise(s: jax.Array, second: float, *, a: float = 0.7) -> jax.Array:
  """Computes Flow-GRPO's g = a sqrt(s / (1 - s)) (arXiv 2505.05470).

  Args:
    s: noise levels of the steps' inputs, [B].
    second: the sampler's second level, which stands for the first one, where g is infinite.
    a: strength of the noise.
  """
  level = jnp.where(s < 1.0, s, second)
  return a * jnp.sqrt(level / (1.0 - level))


def sde_moments(
  x: jax.Array, v: jax.Array, s: jax.Array, s_next: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and standard deviation of an Euler step of the stochastic process.

  With `flow_sde_noise` the step is Flow-GRPO's, with a constant g (0.3) DanceGRPO's.

  Args:
    x: states, [B, ...].
    v: predicted velocities, noise minus clean image, [B, ...].
    s: noise levels of the states, above 0, [B].
    s_next: the next, lower levels, [B].
    g: density of the noise, [B].

  Returns:
    The mean [B, ...] and the standard deviation [B].
  """
  step = s_next - s
  level, ds, square = (per_sample(of, x) for of in (s, step, jnp.square(g)))
  score = -(x + (1.0 - level) * v) / level
  return x + (v - 0.5 * square * score) * ds, g * jnp.sqrt(-step)


def preserving_moments(
  x: jax.Array, v: jax.Array, s: jax.Array, s_next: jax.Array, *, a: float = 0.8
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and standard deviation of a coefficient-preserving step.

  The step's noise keeps its level, of which the share sin(a pi / 2) is new. The methods that
  use it compare -mean (x - mean)^2, without the deviation, and not `gaussian_log_prob`.

  Args:
    x: states, [B, ...].
    v: predicted velocities, [B, ...].
    s: noise levels of the states, [B].
    s_next: the next levels, [B].
    a: strength of the noise, from 0 to 1.

  Returns:
    The mean [B, ...] and the standard deviation [B].
  """
  clean = x - per_sample(s, x) * v
  noise = x + (1.0 - per_sample(s, x)) * v
  kept = per_sample(s_next * math.cos(a * math.pi / 2), x)
  return (1.0 - per_sample(s_next, x)) * clean + kept * noise, s_next * math.sin(
    a * math.pi / 2
  )
