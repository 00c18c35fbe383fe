"""Batches as networks see them: rows with their images noised, an arm each.

Draws of noise and timesteps are either new at every update, or a fixed number for each row,
so that a reference's errors on them need to be computed only once.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpref import rng
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.losses import Arranged, Needs
from jaxpref.training.rollout import States


@flax.struct.dataclass
class Arms:
  """Rows of a batch; R of them with A arms.

  Attributes:
    x_t: noised latents, [R, A, C, h, w]. Arms are on axis 1, so that splitting rows over
      devices keeps the images of a row together.
    target: what a denoiser should answer, [R, A, C, h, w].
    t: timesteps, which a row's arms share, int32 [R].
    cond: prompts, which they share, too, a tree of [R, ...].
    labels: further columns by name, [R].
    ref: a reference's errors by arm, [R], where they are known beforehand.
  """

  x_t: jax.Array
  target: jax.Array
  t: jax.Array
  cond: Any
  labels: dict[str, jax.Array]
  ref: dict[str, jax.Array]


def make_arms(
  schedule: schedule_lib.NoiseSchedule,
  needs: Needs,
  batch: Any,
  rollout: States | None,
  uncond: Any,
  *,
  seed: int | jax.Array,
  update: int | jax.Array,
  prompt_dropout: float,
  arrange: Callable[..., Arranged] | None = None,
) -> Arms:
  """A batch with what the policy drew for it, noised.

  Args:
    schedule: noise schedule.
    needs: of the loss.
    batch: 'latents' [B, A, C, h, w], 'cond' (a tree of [B, ...]) and 'labels' (a dict of
      [B]); where latents are to be sampled also 'std' [B, A, C, h, w]; where draws are fixed
      also 'row' and 'draw' (int32 [B]), which number them, and perhaps 'ref' (a dict of [B]).
    rollout: one more arm, or None.
    uncond: the empty prompt, [1, ...].
    seed: of the run.
    update: number of updates done.
    prompt_dropout: share of rows that lose their prompt.
    arrange: the loss's, with its hyper-parameters.
  """
  x0, cond, labels = _clean(batch, seed, update), batch["cond"], batch.get("labels", {})
  image = None
  if arrange:
    key = rng.key_of(seed, "arrange", update)
    if "std" in batch:  # what is shown is not sampled, as InstructPix2Pix has it
      image = arrange(batch["latents"], cond, uncond, key).image
    x0, cond, shown, more = arrange(x0, cond, uncond, key)
    image = shown if image is None else image
    labels = {**labels, **more}
  noise_shape = (1 if needs.shared_noise else x0.shape[1], *x0.shape[2:])
  if "draw" in batch:
    dropped, t, eps = _fixed_draws(
      schedule, batch["row"], batch["draw"], noise_shape, seed=seed, rate=prompt_dropout
    )
  else:
    rows = x0.shape[0]
    key = rng.key_of(seed, "train", update)
    dropped = rng.dropped_rows(seed, update, rows, rate=prompt_dropout)
    t = jax.random.randint(jax.random.fold_in(key, 0), (rows,), 0, schedule.num_timesteps)
    states = 1 if rollout is None else rollout.t.shape[1]
    eps = jax.random.normal(jax.random.fold_in(key, 1), (rows * states, *noise_shape))
  cond = rng.without_prompts(dropped, cond, uncond)
  if image is not None:
    cond = {**cond, "image": image}
  if rollout is not None:
    # Each state stands in a row of its own, beside the row's images at its timestep.
    count = rollout.t.shape[1]
    repeat = lambda x: jnp.repeat(x, count, axis=0)  # noqa: E731
    x0, cond, labels = jax.tree.map(repeat, (x0, cond, labels))
    t = rollout.t.reshape(-1)
  eps = jnp.broadcast_to(eps, x0.shape)
  x_t = schedule_lib.add_noise(schedule, x0, eps, t)
  target = schedule_lib.target(schedule, x0, eps, t)
  if rollout is not None:
    own, answers = (x.reshape((-1, 1, *x.shape[2:])) for x in (rollout.x_t, rollout.target))
    x_t = jnp.concatenate([x_t, own], axis=1)
    target = jnp.concatenate([target, answers.astype(target.dtype)], axis=1)
  return Arms(x_t, target, t, cond, labels, batch.get("ref", {}))


def _clean(batch: Any, seed: int | jax.Array, update: int | jax.Array) -> jax.Array:
  """Returns the clean latents [B, A, C, h, w], sampled from posteriors that have a 'std'.

  Each update samples anew; where draws are fixed, each draw of a row has its own sample.
  """
  mode = batch["latents"]
  if "std" not in batch:
    return mode
  if "draw" in batch:
    root = rng.key_of(seed, "posterior draws", 0)
    key_of = lambda row, draw: jax.random.fold_in(jax.random.fold_in(root, row), draw)  # noqa: E731
    keys = jax.vmap(key_of)(batch["row"], batch["draw"])
    eps = jax.vmap(lambda key: jax.random.normal(key, mode.shape[1:]))(keys)
  else:
    eps = jax.random.normal(rng.key_of(seed, "posterior", update), mode.shape)
  return mode + batch["std"] * eps


def _fixed_draws(schedule, row, draw, noise_shape, *, seed, rate):
  """Which prompts are dropped, timesteps and noise of draw `draw` of row `row`."""
  root = rng.key_of(seed, "noise draws", 0)

  def one(row, draw):
    key = jax.random.fold_in(jax.random.fold_in(root, row), draw)
    dropped, t, eps = (jax.random.fold_in(key, i) for i in range(3))
    return (
      jax.random.bernoulli(dropped, rate),
      jax.random.randint(t, (), 0, schedule.num_timesteps),
      jax.random.normal(eps, noise_shape),
    )

  return jax.vmap(one)(row, draw)
