"""Random noise levels of training: timesteps, or the levels of a flow with a chosen density."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxpref.base_config import DENSITIES
from jaxpref.diffusion.flow import Density, FlowSchedule, shifted
from jaxpref.diffusion.schedule import Schedule
from jaxpref.errors import UserError


def training_schedule(schedule: Schedule, density: Density, *, shift: float = 0.0) -> Schedule:
  """Returns a schedule with the density and shift of its training levels.

  Args:
    schedule: of the model.
    density: of a flow's levels before the shift.
    shift: of a flow's levels, also of its rollouts; 0 keeps the model's own.

  Raises:
    UserError: a setting is invalid, would be ignored, or is not one of the model's process.
  """
  usual = Density()
  if density.name not in DENSITIES:
    raise UserError(
      f"noise.density must be one of {', '.join(DENSITIES)} (got {density.name!r})"
    )
  if not isinstance(schedule, FlowSchedule):
    given = {"density": density.name != usual.name, "shift": bool(shift)}
    if wrong := [f"noise.{name}" for name, is_set in given.items() if is_set]:
      raise UserError(
        f"{wrong[0]} is for models of flow matching, and this model is trained on uniform "
        "timesteps of a variance-preserving schedule"
      )
  for name in ("mean", "std", "scale"):
    unread = name not in DENSITIES[density.name]
    if unread and getattr(density, name) != getattr(usual, name):
      raise UserError(f"noise.{name} has no effect on noise.density = {density.name!r}")
  if not isinstance(schedule, FlowSchedule):
    return schedule
  schedule = dataclasses.replace(schedule, density=density)
  return dataclasses.replace(schedule, shift=shift, dynamic=None) if shift else schedule


def sample_levels(schedule: Schedule, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Samples training levels: uniform timesteps, int32, or levels of a flow, float32."""
  if isinstance(schedule, FlowSchedule):
    return level_at(schedule, jax.random.uniform(key, shape))
  return jax.random.randint(key, shape, 0, schedule.num_timesteps)


def level_at(schedule: Schedule, share: jax.Array) -> jax.Array:
  """Computes the quantile of the training levels at `share`, in [0, 1).

  With `u` the level before the shift, and the densities of arXiv 2403.03206, section 3.1:
    'uniform': u = share;
    'logit_normal': logit(u) is normal with the density's mean and std;
    'mode': u = 1 - r - scale (cos^2(pi r / 2) - 1 + r), with r = 1 - share.

  Returns:
    Timesteps, int32, or levels of a flow, float32.
  """
  if not isinstance(schedule, FlowSchedule):
    return (share * schedule.num_timesteps).astype(jnp.int32)
  density, shift = schedule.density, schedule.shift
  if density.name == "logit_normal":
    # The shift is a translation of the logit.
    normal = jax.scipy.special.ndtri(share)
    return jax.nn.sigmoid(math.log(shift) + density.mean + density.std * normal)
  if density.name == "mode":
    bend = jnp.square(jnp.sin(0.5 * jnp.pi * share)) - share
    share = jnp.clip(share - density.scale * bend, 0.0, 1.0)
  return shifted(share, shift)
