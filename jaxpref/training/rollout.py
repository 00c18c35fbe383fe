"""Online negatives: samples that the policy generates for the prompts of the rows.

The sampler is a separate program from the train step and takes the parameters as an argument:
those of the current policy or of a copy that lags behind it.
"""

import functools
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
from jaxpref.diffusion.schedule import Schedule
from jaxpref.models.denoiser import Denoise


@flax.struct.dataclass
class States:
  """The S states that are kept of each of B sampled trajectories.

  Attributes:
    x_t: noised latents, [B, S, C, h, w].
    target: the sampling model's predictions for them, [B, S, C, h, w].
    t: noise levels, [B, S]: timesteps, int32, or a flow's sigma. The images of a row are noised
      to the same levels.
  """

  x_t: jax.Array
  target: jax.Array
  t: jax.Array


def make_rollout(
  denoise: Denoise,
  schedule: Schedule,
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
  """Makes the jitted program that samples from the policy.

  Each sample's timesteps are shifted by a random offset, so that all timesteps are trained.
  (The last few are not if `num_steps` does not divide the number of timesteps. A flow's levels
  are all trained.) Of the
  `num_steps` states of a trajectory, `states_per_trajectory` are kept, evenly spaced from a
  random one on. Every state is equally likely, and none is kept twice.

  Steps after a trajectory's last kept state would be wasted. With `batch_size`, rows are
  sorted by the step of that state and sampled in chunks, and each chunk stops at its last kept
  state. With one state per trajectory and many chunks, that is halfway on average. The states
  do not depend on the chunks.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: noise schedule, from `levels.training_schedule`.
    mesh: from `sharding.make_mesh`.
    latent_shape: channels, height and width of a latent.
    num_steps: number of solver steps from noise to image.
    solver: 'dpm_solver', 'ddim' or 'ddpm'.
    order: order of the DPM-Solver.
    guidance: classifier-free guidance scale; at most 1: no guidance, as published.
    prompt_dropout: share of rows sampled without their prompt. With the same share, the train
      step drops the prompts of the same rows.
    states_per_trajectory: number of states to keep, from 1 to `num_steps`.
    batch_size: rows per chunk, rounded up by `chunk_size`; 0: all rows at once, as published.

  Returns:
    `rollout(params, seed, update, cond, uncond, guide=None, *, latent_shape=...) -> States`.
    `cond` is a tree of [B, ...], the others of [1, ...]: `uncond` is the conditioning of the
    dropped prompt, and guidance leads away from `guide`, by default `uncond`. Another
    `latent_shape` is another program.
  """

  @functools.partial(jax.jit, static_argnames="latent_shape")
  def rollout(
    params: Any, seed, update, cond, uncond, guide=None, latent_shape=latent_shape
  ) -> States:
    rows = jax.tree.leaves(cond)[0].shape[0]
    key = rng.key_of(seed, "rollout", update)
    dropped = rng.sample_dropped_rows(seed, update, rows, rate=prompt_dropout)
    cond = rng.drop_prompts(dropped, cond, uncond)
    offsets = timesteps_lib.sample_offsets(
      schedule, num_steps, jax.random.fold_in(key, 0), rows
    )
    tokens = timesteps_lib.image_tokens(latent_shape)
    first = jax.random.randint(jax.random.fold_in(key, 1), (rows,), 0, num_steps)
    noise_keys = jax.random.split(jax.random.fold_in(key, 2), rows)
    stride = num_steps // states_per_trajectory
    picks = (first[:, None] + stride * jnp.arange(states_per_trajectory)) % num_steps

    def sample(chunk) -> States:
      cond, offsets, noise_keys, picks = chunk
      guided = guidance_lib.classifier_free(
        *(lambda x_t, t, c: denoise(params, x_t, t, c), cond),
        *(uncond if guide is None else guide, guidance),
      )
      seen = sampler_lib.sample_until(
        guided,
        sampler_lib.initial_noise(noise_keys, latent_shape),
        timesteps_lib.offset_grid(schedule, num_steps, offsets, tokens=tokens),
        schedule,
        picks.T,
        solver=solver,
        order=order,
        key=noise_keys,
      )
      by_row = lambda x: x.swapaxes(0, 1)  # noqa: E731
      return States(*map(by_row, (seen.states, seen.predictions, seen.timesteps)))

    inputs = (cond, offsets, noise_keys, picks)
    size = chunk_size(rows, batch_size, devices=mesh.size)
    if size == rows:
      return sample(inputs)
    return _map_chunks(sample, inputs, jnp.argsort(picks.max(axis=1)), size, mesh)

  return rollout


def chunk_size(rows: int, batch_size: int, *, devices: int) -> int:
  """Returns the number of rows per chunk.

  It is the smallest divisor of `rows` that is at least `batch_size` and a multiple of
  `devices`: all chunks, and all devices within a chunk, get the same number of rows.

  Args:
    rows: number of rows of an update, a multiple of `devices`.
    batch_size: smallest number of rows per chunk, over all devices; 0: all rows.
    devices: number of devices that share a chunk.
  """
  sizes = range(batch_size or rows, rows)
  return next((n for n in sizes if rows % n == 0 and n % devices == 0), rows)


def _map_chunks(
  sample: Callable[[Any], Any], rows: Any, order: jax.Array, size: int, mesh: Mesh
) -> Any:
  """Applies `sample` to chunks of `size` rows, taken in `order`; restores the rows' order."""
  count = order.shape[0]
  over_devices = NamedSharding(mesh, P(None, sharding.BATCH_AXES))

  def split(x):
    x = x[order].reshape(count // size, size, *x.shape[1:])
    return jax.lax.with_sharding_constraint(x, over_devices)

  sampled = jax.lax.map(sample, jax.tree.map(split, rows))
  place = jnp.argsort(order)
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(
      x.reshape(count, *x.shape[2:])[place], sharding.batch_sharding(mesh)
    ),
    sampled,
  )


@flax.struct.dataclass
class Replay:
  """A buffer of the rows of past updates, for an ablation of online training.

  Attributes:
    rows: N updates of R rows each, a tree of [N, R, ...].
  """

  rows: Any


def init_replay(rows: Any, size: int) -> Replay:
  """Makes an empty buffer for `size` updates with rows shaped like `rows`, [R, ...]."""
  return Replay(jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), rows))


def replay(buffer: Replay, rows: Any, update: jax.Array, key: jax.Array) -> tuple[Any, Replay]:
  """Picks each row uniformly from this update and the buffered ones.

  Args:
    buffer: rows of N updates.
    rows: rows of this update, a tree of [R, ...].
    update: number of updates done.
    key: random key of the choice.

  Returns:
    The rows to train on, and the buffer, in which the rows of this update replace the oldest.
  """
  size, count = jax.tree.leaves(buffer.rows)[0].shape[:2]
  held = jnp.minimum(update, size)
  pick = jax.random.randint(key, (count,), 0, held + 1)  # `held`: this update
  old = jax.tree.map(lambda x: x[pick.clip(max=size - 1), jnp.arange(count)], buffer.rows)

  def choose(now, before):
    fresh = (pick == held).reshape((-1,) + (1,) * (now.ndim - 1))
    return jnp.where(fresh, now, before)

  mixed = jax.tree.map(choose, rows, old)
  slot = update % size
  return mixed, Replay(jax.tree.map(lambda b, x: b.at[slot].set(x), buffer.rows, rows))
