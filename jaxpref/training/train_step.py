"""The train step of every method: noise, denoise, loss, gradient, update.

It is one jitted program over the mesh that donates its state. Policy and reference go through
the same `denoise`, each with all arms of a batch in one call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpref import rng, sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.losses import Loss, Needs, Terms, to_errors
from jaxpref.models.denoiser import Denoise
from jaxpref.training import batch as batch_lib
from jaxpref.training import mean_gradients, path_rows, step_rows
from jaxpref.training import optimizer as optimizer_lib
from jaxpref.training import rollout as rollout_lib
from jaxpref.training.rollout import States


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint must hold.

  Attributes:
    params: trained parameters, float32: all of the policy's, or its LoRA matrices.
    ema: moving average of `params`, float32.
    opt_state: state of the optax optimizer.
    policy_copy: `params` at the last refresh if the rollout uses a lagging copy, or a lagging
      average of them if the loss needs one, else None.
    seed: of the run, int32 scalar; an input, so that one program serves every seed.
    update: number of updates done, int32 scalar.
    skipped: number of those that changed nothing, because their loss or gradient was not
      finite, int32 scalar.
    replay: rows of earlier updates, a `rollout.Replay`, or None.
  """

  params: Any
  ema: Any
  opt_state: Any
  policy_copy: Any
  seed: jax.Array
  update: jax.Array
  skipped: jax.Array
  replay: Any = None


class _Fixed(NamedTuple):
  """Inputs of the loss that have no gradient.

  Attributes:
    base: the base's parameters, or None.
    start: trained parameters at the start if they are the reference, else None.
    old: those of the lagging policy if the loss needs it, else None.
    guide: conditioning that guidance leads away from if guided steps are trained, else None.
  """

  base: Any
  start: Any
  old: Any
  guide: Any


def needs_copy(needs: Needs, refresh_every: int) -> bool:
  """Tells whether a run needs a copy of the policy that lags behind it."""
  return needs.old or (bool(needs.rollout) and refresh_every > 1)


def init_state(
  params: Any,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  lagging_copy: bool,
  replay: Any = None,
) -> TrainState:
  """Makes the state before the first update, with a policy copy if `lagging_copy`."""
  return TrainState(
    # Copies: the state is donated, and the caller may keep `params` as the reference.
    params=jax.tree.map(jnp.copy, params),
    ema=jax.tree.map(jnp.copy, params),
    opt_state=tx.init(params),
    policy_copy=jax.tree.map(jnp.copy, params) if lagging_copy else None,
    seed=jnp.asarray(seed, jnp.int32),
    update=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
    replay=replay,
  )


def make_train_step(
  denoise: Denoise,
  schedule: schedule_lib.Schedule,
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh,
  state_sharding: Any,
  arms: Sequence[str],
  learning_rate: optax.Schedule,
  ema_decay: float,
  prompt_dropout: float,
  accumulate: int = 1,
  refresh_every: int = 1,
  copy_decay: optax.Schedule | None = None,
  own_targets: bool = False,
  guidance: float = 1.0,
  space: str = "model",
  adapt: Callable[[Any, Any], Any] = lambda trained, base: trained,
) -> Callable:
  """Makes the jitted program of one update.

  Args:
    denoise: (params, x_t, t, cond) -> prediction, or the `reward_model.Score` of a loss that
      trains one.
    schedule: noise schedule, from `levels.training_schedule`.
    loss: from `losses.make_loss`.
    tx: optimizer.
    mesh: from `sharding.make_mesh`.
    state_sharding: of a `TrainState`, for the new state as for the old: a resumed run must
      compile to the program of an uninterrupted one.
    arms: names of the images of a row and, last, of the policy's own samples.
    learning_rate: the schedule in `tx`, for the metric 'optim/lr'.
    ema_decay: limit of the moving average's decay.
    prompt_dropout: share of rows trained without their prompt.
    accumulate: number of micro-batches of an update.
    refresh_every: number of updates between two refreshes of `TrainState.policy_copy`.
    copy_decay: from the number of updates done to the share of itself that the copy keeps when
      it is refreshed; None: it becomes the policy.
    own_targets: whether the rollout's targets are the policy's own predictions at this
      update (refreshed at every update, without guidance). The error there is 0 and so is
      its gradient: neither is computed, which halves the policy's part of the work.
    guidance: scale of the guidance of trained steps, see `step_rows.residuals`.
    space: of the errors, see `schedule.error_scale`.
    adapt: (trained parameters, base) -> the policy's parameters for `denoise`.

  Returns:
    `step(state, base, uncond, batch, rollout, start=None, guide=None) -> (state, metrics)`.
    `base` are the base's parameters, or None if neither `adapt` nor the reference needs them.
    `batch` is the input of `make_arms` in `batch`, `step_rows` or `path_rows`. `rollout` is a
    `States` or None. `start` are the trained parameters at the start if they are the reference,
    else None. `guide` is the conditioning that the guidance of trained steps leads away from.
    Metrics are scalars. If the loss or its gradient is not finite, only the state's counts
    change.
  """
  residuals_of = _make_residuals(denoise, schedule, loss.needs, space, guidance)
  gradients_of = _make_gradients(residuals_of, loss, tuple(arms), own_targets, adapt)
  gradients = mean_gradients.average(gradients_of, accumulate, mesh)

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(state_sharding, sharding.replicated(mesh))
  )
  def step(
    state: TrainState, base, uncond, batch, rollout: States | None, start=None, guide=None
  ):
    rows = _make_rows(
      *(schedule, loss, arms, batch, rollout, uncond),
      seed=state.seed,
      update=state.update,
      prompt_dropout=prompt_dropout,
    )
    replay = state.replay
    if replay is not None:
      key = rng.key_of(state.seed, "replay", state.update)
      rows, replay = rollout_lib.replay(replay, rows, state.update, key)
    old = state.policy_copy if loss.needs.old else None
    grads, metrics = gradients(state.params, _Fixed(base, start, old, guide), rows)
    return finish(
      *(state, grads, metrics, tx),
      learning_rate=learning_rate,
      ema_decay=ema_decay,
      refresh_every=refresh_every,
      copy_decay=copy_decay,
      replay=replay,
    )

  return step


def _make_residuals(
  denoise: Denoise,
  schedule: schedule_lib.Schedule,
  needs: Needs,
  space: str,
  guidance: float,
) -> Callable[..., dict[str, jax.Array]]:
  """Returns the function (params, guide, rows, arms) -> residuals, or rewards, by arm."""
  if needs.judges:
    return functools.partial(rewards, denoise, schedule)
  if needs.of_steps:
    return functools.partial(step_rows.residuals, denoise, schedule, guidance)
  of_images = functools.partial(_residuals, denoise, schedule, space)
  return lambda params, guide, rows, arms: of_images(params, rows, arms)


def _make_rows(
  schedule: schedule_lib.Schedule,
  loss: Loss,
  arms: Sequence[str],
  batch: Any,
  rollout: States | None,
  uncond: Any,
  **options: Any,
) -> batch_lib.Arms:
  """Returns the rows of a batch, see `batch.make_arms` for the arguments."""
  if loss.needs.rows == "paths":
    return path_rows.make_arms(batch)
  if loss.needs.of_steps:
    return step_rows.make_arms(batch, arms)
  return batch_lib.make_arms(
    *(schedule, loss.needs, batch, rollout, uncond), **options, arrange=loss.arrange
  )


def finish(
  state: TrainState,
  grads: Any,
  metrics: dict[str, jax.Array],
  tx: optax.GradientTransformation,
  *,
  learning_rate: optax.Schedule,
  ema_decay: float,
  refresh_every: int = 1,
  copy_decay: optax.Schedule | None = None,
  replay: Any = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Ends an update: the new state, and the metrics with the optimizer's.

  Args:
    state: before the update.
    grads: of the trained parameters.
    metrics: with the 'loss'. If it or a gradient is not finite, only the counts change.
    tx: optimizer.
    learning_rate: see `make_train_step`.
    ema_decay: see `make_train_step`.
    refresh_every: see `make_train_step`.
    copy_decay: see `make_train_step`.
    replay: the new buffer of rows, if the state has one.
  """
  norm = optax.global_norm(grads)
  new = jax.lax.cond(
    jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm),
    lambda s, g, r: dataclasses.replace(
      _advance(
        *(s, g, tx),
        ema_decay=ema_decay,
        refresh_every=refresh_every,
        copy_decay=copy_decay,
      ),
      replay=r,
    ),
    lambda s, g, r: dataclasses.replace(s, skipped=s.skipped + 1),
    *(state, grads, replay),
  )
  new = dataclasses.replace(new, update=state.update + 1)
  return new, {
    **metrics,
    "optim/lr": learning_rate(state.update - state.skipped),  # skipped ones do not count
    "optim/grad_norm": norm,
    "optim/skipped": new.skipped,
  }


def _micro_loss(
  residuals_of: Callable[..., dict[str, jax.Array]],
  loss: Loss,
  arms: tuple[str, ...],
  own_targets: bool,
  adapt: Callable[[Any, Any], Any],
  trained: Any,
  fixed: _Fixed,
  rows: batch_lib.Arms,
  mean: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the mean loss of a micro-batch and the means of its metrics."""
  base, start, old, guide = fixed
  computed = arms[:-1] if own_targets else arms
  residuals = residuals_of(adapt(trained, base), guide, rows, computed)
  if own_targets:
    residuals[arms[-1]] = jnp.zeros_like(residuals[arms[0]])
  of_reference, known = {}, dict(rows.ref)
  if loss.needs.reference and not known:
    reference = base if start is None else adapt(start, base)
    of_reference = jax.lax.stop_gradient(residuals_of(reference, guide, rows, arms))
  of_old = {}
  if loss.needs.old:
    of_old = jax.lax.stop_gradient(residuals_of(adapt(old, base), guide, rows, arms))
  err = {} if loss.needs.judges else to_errors(residuals)
  err_ref, err_old = known or to_errors(of_reference), to_errors(of_old)
  if loss.needs.residuals or loss.needs.judges:
    terms = Terms(residuals, of_reference, rows.labels, mean, of_old)
  else:
    terms = Terms(err, err_ref, rows.labels, mean, err_old)
  per_sample, metrics = loss.objective(terms)
  metrics = {
    "loss": per_sample,
    **{f"err/policy_{a}": e for a, e in err.items()},
    **{f"err/reference_{a}": e for a, e in err_ref.items()},
    **{f"err/old_{a}": e for a, e in err_old.items()},
    **metrics,
  }
  return per_sample.mean(), jax.tree.map(jnp.mean, metrics)


def _make_gradients(
  residuals_of: Callable[..., dict[str, jax.Array]],
  loss: Loss,
  arms: tuple[str, ...],
  own_targets: bool,
  adapt: Callable[[Any, Any], Any],
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
  """Returns the function of a micro-batch's gradient and metrics."""
  if loss.needs.rows == "paths":
    return functools.partial(path_rows.gradients, residuals_of, loss, arms, adapt)
  loss_of = functools.partial(_micro_loss, residuals_of, loss, arms, own_targets, adapt)

  def gradients_of(trained, fixed, rows, mean):
    return jax.grad(functools.partial(loss_of, mean=mean), has_aux=True)(trained, fixed, rows)

  return gradients_of


def _advance(
  state: TrainState,
  grads: Any,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  refresh_every: int,
  copy_decay: optax.Schedule | None = None,
) -> TrainState:
  """Applies the optimizer, then renews the average and, if it is due, the policy's copy."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  # Barrier: otherwise XLA recomputes the new parameters inside the average.
  params = jax.lax.optimization_barrier(optax.apply_updates(state.params, updates))
  copy = state.policy_copy
  if copy is not None:
    renew = (state.update + 1) % refresh_every == 0
    new = params
    if copy_decay is not None:
      kept = copy_decay(state.update + 1)
      new = jax.tree.map(lambda c, p: kept * c + (1 - kept) * p, copy, params)
    copy = jax.tree.map(lambda c, p: jnp.where(renew, p, c), copy, new)
  ema = optimizer_lib.update_ema(state.ema, params, state.update, decay=ema_decay)
  return dataclasses.replace(
    state, params=params, ema=ema, opt_state=opt_state, policy_copy=copy
  )


def make_reference_errors(
  denoise: Denoise,
  schedule: schedule_lib.Schedule,
  loss: Loss,
  *,
  arms: Sequence[str],
  prompt_dropout: float,
  space: str = "model",
) -> Callable:
  """Makes the jitted program of the reference's errors on fixed noise.

  Returns:
    `errors(base, seed, uncond, batch)` -> errors by arm, float32 [B], for a batch with 'row'
    and 'draw' (see `batch.make_arms`). The other arguments are those of `make_train_step`.
  """

  @jax.jit
  def errors(base, seed, uncond, batch):
    rows = batch_lib.make_arms(
      *(schedule, loss.needs, batch, None, uncond),
      seed=seed,
      update=0,
      prompt_dropout=prompt_dropout,
    )
    return to_errors(_residuals(denoise, schedule, space, base, rows, arms))

  return errors


def _residuals(
  denoise: Denoise,
  schedule: schedule_lib.Schedule,
  space: str,
  params: Any,
  rows: batch_lib.Arms,
  arms: Sequence[str],
) -> dict[str, jax.Array]:
  """Returns predictions minus targets of the first arms, in `space`, float32 [R, C, h, w] each.

  All arms go through the denoiser in one call.
  """
  count = len(arms)
  flat = lambda x: x[:, :count].reshape((-1, *x.shape[2:]))  # noqa: E731
  prediction = denoise(params, *_flat_inputs(schedule, rows, count))
  residual = prediction.astype(jnp.float32) - flat(rows.target)
  residual = residual.reshape((-1, count, *residual.shape[1:]))
  if (scale := schedule_lib.error_scale(schedule, space, rows.t)) is not None:
    residual = schedule_lib.per_sample(scale, residual) * residual
  return {arm: residual[:, i] for i, arm in enumerate(arms)}


def _flat_inputs(
  schedule: schedule_lib.Schedule, rows: batch_lib.Arms, count: int
) -> tuple[jax.Array, jax.Array, Any]:
  """Returns the latents, timesteps and conditioning of the first `count` arms, [R * count]."""
  x_t = rows.x_t[:, :count].reshape((-1, *rows.x_t.shape[2:]))
  t = schedule_lib.timestep_input(schedule, jnp.repeat(rows.t, count))
  return x_t, t, jax.tree.map(lambda c: jnp.repeat(c, count, axis=0), rows.cond)


def rewards(
  score: Callable[..., jax.Array],
  schedule: schedule_lib.Schedule,
  params: Any,
  guide: Any,
  rows: batch_lib.Arms,
  arms: Sequence[str],
) -> dict[str, jax.Array]:
  """Computes a reward model's rewards by arm, float32 [R] each.

  Args:
    score: a `reward_model.Score`, of latents or of predicted images.
    schedule: noise schedule.
    params: of the model.
    guide: conditioning that its guidance leads away from, a tree of [1, ...], or None.
    rows: noised images; their targets are not used.
    arms: names of a row's images.
  """
  count = len(arms)
  found = score(params, *_flat_inputs(schedule, rows, count), guide).reshape(-1, count)
  return {arm: found[:, i] for i, arm in enumerate(arms)}
