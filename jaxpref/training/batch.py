"""Noised batches: the images of each row, noised to one level, are the row's arms.

Noise and timesteps are new at every update. With `data.noise_draws`, each row has a fixed
number of samples of them instead, and the reference's errors on them are computed only once.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpref import rng
from jaxpref.diffusion import levels
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.losses import Arranged, Needs
from jaxpref.training.rollout import States


@flax.struct.dataclass
class Arms:
  """A noised batch of R rows with A arms.

  Attributes:
    x_t: noised latents, [R, A, C, h, w]. Arms are on axis 1, so that sharding the rows keeps
      the images of a row on one device.
    target: correct predictions of the denoiser, [R, A, C, h, w].
    t: noise levels, shared by the arms of a row, [R]: timesteps, int32, or a flow's sigma.
    cond: conditioning, also shared by the arms of a row, a tree of [R, ...].
    labels: further columns by name, [R].
    ref: the reference's errors by arm, [R]; empty if they were not computed beforehand.
  """

  x_t: jax.Array
  target: jax.Array
  t: jax.Array
  cond: Any
  labels: dict[str, jax.Array]
  ref: dict[str, jax.Array]


def make_arms(
  schedule: schedule_lib.Schedule,
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
  """Noises a batch and appends the policy's own samples as the last arm.

  Args:
    schedule: noise schedule, from `levels.training_schedule`.
    needs: the inputs that the loss needs.
    batch: 'latents' [B, A, C, h, w], 'cond' (a tree of [B, ...]) and 'labels' (a dict of
      [B]). With 'std' [B, A, C, h, w], latents are sampled from the VAE's posterior. With
      fixed noise also 'row' and 'draw' (int32 [B]), the numbers of the row and of its noise
      sample, and optionally 'ref', the reference's errors on it (a dict of [B]).
    rollout: S states per trajectory, or None. Each row is repeated for each of its states,
      so R is B * S.
    uncond: conditioning of the dropped prompt, a tree of [1, ...].
    seed: seed of the run.
    update: number of updates done.
    prompt_dropout: share of rows trained without their prompt.
    arrange: the loss's `arrange` with its hyper-parameters bound; None keeps the rows as
      they are.
  """
  x0, cond, labels = _clean(batch, seed, update), batch["cond"], batch.get("labels", {})
  image = None
  if arrange:
    key = rng.key_of(seed, "arrange", update)
    if "std" in batch:  # the input image is the posterior's mode, as in InstructPix2Pix
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
    dropped = rng.sample_dropped_rows(seed, update, rows, rate=prompt_dropout)
    t = levels.sample_levels(schedule, jax.random.fold_in(key, 0), (rows,))
    states = 1 if rollout is None else rollout.t.shape[1]
    eps = jax.random.normal(jax.random.fold_in(key, 1), (rows * states, *noise_shape))
  cond = rng.drop_prompts(dropped, cond, uncond)
  if image is not None:
    cond = {**cond, "image": image}
  if rollout is not None:
    # Each state becomes a row, with the images of its row noised to the state's level.
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
  """Returns clean latents [B, A, C, h, w], sampled from the posterior if 'std' is given.

  Samples are new at every update. With fixed noise, each noise sample of a row has its own.
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
  """Returns whether the prompt is dropped, the level and the noise of each sample."""
  root = rng.key_of(seed, "noise draws", 0)

  def one(row, draw):
    key = jax.random.fold_in(jax.random.fold_in(root, row), draw)
    dropped, t, eps = (jax.random.fold_in(key, i) for i in range(3))
    return (
      jax.random.bernoulli(dropped, rate),
      levels.sample_levels(schedule, t, ()),
      jax.random.normal(eps, noise_shape),
    )

  return jax.vmap(one)(row, draw)
