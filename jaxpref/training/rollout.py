"""Online negatives: what the policy itself makes of the rows' prompts.

The sampler is a program of its own, apart from the train step, and its parameters are an
argument: the policy as it is (refreshed at every update) or a copy that lags behind.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref import rng, sharding
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.diffusion.schedule import NoiseSchedule
from jaxpref.models.unet import Denoise


@flax.struct.dataclass
class States:
  """States of each sampled trajectory.

  Attributes:
    x_t: what the denoiser was shown, [B, S, C, h, w].
    target: what it answered, [B, S, C, h, w].
    t: timesteps, int32 [B, S]; the row's images are trained at the same.
  """

  x_t: jax.Array
  target: jax.Array
  t: jax.Array


def make_rollout(
  denoise: Denoise,
  schedule: NoiseSchedule,
  *,
  mesh: Mesh,
  latent_shape: tuple[int, int, int],
  num_steps: int,
  solver: str,
  order: int,
  guidance: float,
  prompt_dropout: float,
  states_per_trajectory: int = 1,
  batch_size: int = 0,
) -> Callable[..., States]:
  """The rollout as one jitted program.

  Each sample's timesteps are shifted by a random offset, so that every timestep is
  trained (where `num_steps` divides their number; else the last few are not). Of its
  `num_steps` states so many are kept, evenly spaced from a random one on: all are equally
  likely, and none is kept twice.

  A trajectory beyond its last kept state is of no use. With a `batch_size`, rows are drawn in
  the order of where that state is, so many at once, and each lot stops at its last: with one
  state of each, and many lots, halfway on average. States are the same, whatever the lots.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: noise schedule.
    mesh: from `sharding.make_mesh`.
    latent_shape: channels, height and width.
    num_steps: solver steps from noise to image.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: of the DPM-Solver.
    guidance: classifier-free guidance scale; at most 1: none, as published.
    prompt_dropout: as in the train step, which drops the same rows' prompts.
    states_per_trajectory: how many are kept, 1 to `num_steps`.
    batch_size: rows drawn at once, see `rows_at_once`; 0: all, which is the published loop.

  Returns:
    `rollout(params, seed, update, cond, uncond, guide=None)`, trees of [B, ...], [1, ...] and
    [1, ...]: `uncond` is the dropped prompt, `guide` what guidance leads away from, by default
    the same.
  """

  @jax.jit
  def rollout(params: Any, seed, update, cond, uncond, guide=None) -> States:
    rows = jax.tree.leaves(cond)[0].shape[0]
    key = rng.key_of(seed, "rollout", update)
    dropped = rng.dropped_rows(seed, update, rows, rate=prompt_dropout)
    cond = rng.without_prompts(dropped, cond, uncond)
    spacing = schedule.num_timesteps // num_steps
    offsets = jax.random.randint(jax.random.fold_in(key, 0), (rows,), 0, spacing)
    first = jax.random.randint(jax.random.fold_in(key, 1), (rows,), 0, num_steps)
    noise_keys = jax.random.split(jax.random.fold_in(key, 2), rows)
    stride = num_steps // states_per_trajectory
    picks = (first[:, None] + stride * jnp.arange(states_per_trajectory)) % num_steps

    def draw(lot) -> States:
      cond, offsets, noise_keys, picks = lot
      guided = guidance_lib.classifier_free(
        *(lambda x_t, t, c: denoise(params, x_t, t, c), cond),
        *(uncond if guide is None else guide, guidance),
      )
      seen = sampler_lib.sample_until(
        guided,
        sampler_lib.initial_noise(noise_keys, latent_shape),
        timesteps_lib.offset_grid(schedule, num_steps, offsets),
        schedule,
        picks.T,
        solver=solver,
        order=order,
        key=noise_keys,
      )
      by_row = lambda x: x.swapaxes(0, 1)  # noqa: E731
      return States(*map(by_row, (seen.states, seen.predictions, seen.timesteps)))

    drawn = (cond, offsets, noise_keys, picks)
    size = rows_at_once(rows, batch_size, devices=mesh.size)
    if size == rows:
      return draw(drawn)
    return _by_lots(draw, drawn, jnp.argsort(picks.max(axis=1)), size, mesh)

  return rollout


def rows_at_once(rows: int, batch_size: int, *, devices: int) -> int:
  """Rows of a lot: as many as asked for, or so many more that lots and devices are alike.

  Args:
    rows: of an update, a multiple of the devices.
    batch_size: asked for, over all devices; 0 for all.
    devices: over which they are spread.
  """
  sizes = range(batch_size or rows, rows)
  return next((n for n in sizes if rows % n == 0 and n % devices == 0), rows)


def _by_lots(
  draw: Callable[[Any], Any], rows: Any, order: jax.Array, batch_size: int, mesh: Mesh
) -> Any:
  """`draw` of so many rows at once, in this order; its results in the rows' own."""
  count = order.shape[0]
  over_devices = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

  def split(x):
    x = x[order].reshape(count // batch_size, batch_size, *x.shape[1:])
    return jax.lax.with_sharding_constraint(x, over_devices)

  drawn = jax.lax.map(draw, jax.tree.map(split, rows))
  place = jnp.argsort(order)
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(
      x.reshape(count, *x.shape[2:])[place], sharding.batch_sharding(mesh)
    ),
    drawn,
  )


@flax.struct.dataclass
class Replay:
  """The rows of the last updates, for the ablation of online training.

  `rows`: a tree of [N, R, ...], N updates of R rows each.
  """

  rows: Any


def init_replay(rows: Any, size: int) -> Replay:
  """An empty buffer of the rows of `size` updates, shaped as the tree `rows` [R, ...]."""
  return Replay(jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), rows))


def replay(buffer: Replay, rows: Any, update: jax.Array, key: jax.Array) -> tuple[Any, Replay]:
  """Each row as it is or, all equally likely, as it was at one of the updates held.

  Args:
    buffer: of N updates' rows.
    rows: of this update, a tree of [R, ...].
    update: number of updates done.
    key: for the choice.

  Returns:
    The rows to train on, and the buffer with the rows of this update in the oldest's place.
  """
  size, count = jax.tree.leaves(buffer.rows)[0].shape[:2]
  held = jnp.minimum(update, size)
  pick = jax.random.randint(key, (count,), 0, held + 1)  # the last one: this update's
  old = jax.tree.map(lambda x: x[pick.clip(max=size - 1), jnp.arange(count)], buffer.rows)

  def choose(now, before):
    fresh = (pick == held).reshape((-1,) + (1,) * (now.ndim - 1))
    return jnp.where(fresh, now, before)

  mixed = jax.tree.map(choose, rows, old)
  slot = update % size
  return mixed, Replay(jax.tree.map(lambda b, x: b.at[slot].set(x), buffer.rows, rows))
