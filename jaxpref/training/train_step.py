"""The train step of every method: noise, denoise policy and reference, loss, update.

One jitted, donated program over the mesh. Policy and reference go through the same
`denoise`, all arms of a batch in one call each.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import losses, rng, sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.losses import Needs, Terms, to_errors
from jaxpref.models.unet import Denoise
from jaxpref.training import batch as batch_lib
from jaxpref.training import optimizer as optimizer_lib
from jaxpref.training import rollout as rollout_lib
from jaxpref.training.rollout import States


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint must hold.

  Attributes:
    params: what is trained of the policy, float32: all its parameters, or additions to
      those of the base.
    ema: its moving average, float32.
    opt_state: of optax.
    policy_copy: the policy as it was at the last renewal, where that one rolls out.
    seed: of the run, int32 scalar; no constant of the program, which serves any.
    update: number of updates done, int32 scalar.
    skipped: how many of them changed nothing, for their loss or gradient was not finite,
      int32 scalar.
    replay: rows of earlier updates, a `rollouts.Replay`, or None.
  """

  params: Any
  ema: Any
  opt_state: Any
  policy_copy: Any
  seed: jax.Array
  update: jax.Array
  skipped: jax.Array
  replay: Any = None


def needs_copy(needs: Needs, refresh_every: int) -> bool:
  """Whether a copy of the policy is kept that lags behind it."""
  return bool(needs.rollout) and refresh_every > 1


def init_state(
  params: Any,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  lagging_copy: bool,
  replay: Any = None,
) -> TrainState:
  """The state before the first update; `lagging_copy` if a copy of the policy is needed."""
  return TrainState(
    # Copies throughout: the state is donated, and `params` may live on as the reference.
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
  schedule: schedule_lib.NoiseSchedule,
  loss: ModuleType,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh,
  state_sharding: Any,
  arms: Sequence[str],
  hyper: Mapping[str, Any],
  learning_rate: optax.Schedule,
  ema_decay: float,
  prompt_dropout: float,
  accumulate: int = 1,
  refresh_every: int = 1,
  own_targets: bool = False,
  adapt: Callable[[Any, Any], Any] = lambda trained, base: trained,
) -> Callable:
  """One update as a jitted program.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: noise schedule.
    loss: a module with the contract of `jaxpref.losses.base`.
    tx: optimizer.
    mesh: from `sharding.make_mesh`.
    state_sharding: of a `TrainState`, for the new state as for the old: a resumed run must
      compile to the program of an uninterrupted one.
    arms: suffixes of a row's images and, last, of what the policy draws.
    hyper: the loss's hyper-parameters.
    learning_rate: the schedule in `tx`, for the metric 'optim/lr'.
    ema_decay: limit of the moving average's decay.
    prompt_dropout: share of rows trained without their prompt.
    accumulate: micro-batches; gradients cross the mesh's `data` axis once, after the last.
    refresh_every: updates after which the lagging policy copy is renewed, if there is one.
    own_targets: whether a rollout's targets are what the policy itself predicts at this
      update (refreshed at every one, no guidance). Its error there is 0 and so is the
      gradient: neither is computed, which halves the policy's part of the work.
    adapt: (what is trained, base) -> the policy's parameters as `denoise` takes them.

  Returns:
    `step(state, base, uncond, batch, rollout, start=None) -> (state, metrics)`; `base` is the
    base's parameters, or None where neither `adapt` nor the reference needs them, `batch` as
    `noising.make_arms` takes it, `rollout` a `States` or None, `start` what was trained at
    the start where that is the reference, else None, metrics are scalars. Where the loss or the
    gradient is not finite the state stays as it was, but for its counts.
  """
  needs = loss.NEEDS
  objective = losses.bind(loss.objective, hyper)
  arrange = losses.bind(loss.arrange, hyper) if hasattr(loss, "arrange") else None

  def micro_loss(trained, base, start, rows: batch_lib.Arms, mean):
    count = len(arms) - own_targets
    seen = _residuals(denoise, adapt(trained, base), rows, arms[:count])
    if own_targets:
      seen[arms[-1]] = jnp.zeros_like(seen[arms[0]])
    seen_ref, known = {}, dict(rows.ref)
    if needs.reference and not known:
      reference = base if start is None else adapt(start, base)
      seen_ref = jax.lax.stop_gradient(_residuals(denoise, reference, rows, arms))
    err = to_errors(seen)
    err_ref = known or to_errors(seen_ref)
    pair = (seen, seen_ref) if needs.residuals else (err, err_ref)
    per_sample, metrics = objective(Terms(*pair, rows.labels, mean))
    metrics = {
      "loss": per_sample,
      **{f"err/policy_{a}": e for a, e in err.items()},
      **{f"err/reference_{a}": e for a, e in err_ref.items()},
      **metrics,
    }
    return per_sample.mean(), jax.tree.map(jnp.mean, metrics)

  def mean_gradients(trained, base, start, rows, mean=jnp.mean):
    """Gradients and metrics of this device's rows, micro-batch by micro-batch."""
    gradients = jax.grad(functools.partial(micro_loss, mean=mean), has_aux=True)
    if accumulate == 1:
      return gradients(trained, base, start, rows)

    def add(total, micro):
      return jax.tree.map(jnp.add, total, gradients(trained, base, start, micro)), None

    # Every so many rows rather than runs of them: the same micro-batches on any mesh.
    micros = jax.tree.map(
      lambda x: x.reshape((-1, accumulate, *x.shape[1:])).swapaxes(0, 1), rows
    )
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(gradients, trained, base, start, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda x: x / accumulate, total)

  def everywhere(x):
    return jax.lax.pmean(jnp.mean(x), "data")

  reduced_gradients = jax.shard_map(
    lambda trained, base, start, rows: jax.lax.pmean(
      mean_gradients(trained, base, start, rows, mean=everywhere), "data"
    ),
    mesh=mesh,
    in_specs=(P(), P(), P(), P("data")),
    out_specs=P(),
    axis_names={"data"},
    # Unchecked, parameters count as each device's own: else JAX would sum the gradient
    # over devices at every micro-batch.
    check_vma=False,
  )
  if mesh.shape["data"] == 1 < mesh.shape["fsdp"]:
    # There is nothing to reduce, and XLA's partitioner refuses a manual axis of one device
    # beside tensors that are split over another.
    reduced_gradients = mean_gradients

  @functools.partial(
    jax.jit, donate_argnums=0, out_shardings=(state_sharding, sharding.replicated(mesh))
  )
  def step(state: TrainState, base, uncond, batch, rollout: States | None, start=None):
    rows = batch_lib.make_arms(
      *(schedule, needs, batch, rollout, uncond),
      seed=state.seed,
      update=state.update,
      prompt_dropout=prompt_dropout,
      arrange=arrange,
    )
    replay = state.replay
    if replay is not None:
      key = rng.key_of(state.seed, "replay", state.update)
      rows, replay = rollout_lib.replay(replay, rows, state.update, key)
    grads, metrics = reduced_gradients(state.params, base, start, rows)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    new = jax.lax.cond(
      finite,
      lambda s, g, r: dataclasses.replace(advance(s, g), replay=r),
      lambda s, g, r: dataclasses.replace(s, skipped=s.skipped + 1),
      *(state, grads, replay),
    )
    new = dataclasses.replace(new, update=state.update + 1)
    optimizer = {
      "optim/lr": learning_rate(state.update - state.skipped),  # skipped ones do not count
      "optim/grad_norm": norm,
      "optim/skipped": new.skipped,
    }
    return new, {**metrics, **optimizer}

  def advance(state: TrainState, grads: Any) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    # Finished before the average is made of them, as `optim` has it with moments.
    params = jax.lax.optimization_barrier(optax.apply_updates(state.params, updates))
    copy = state.policy_copy
    if copy is not None:
      renew = (state.update + 1) % refresh_every == 0
      copy = jax.tree.map(lambda c, p: jnp.where(renew, p, c), copy, params)
    ema = optimizer_lib.update_ema(state.ema, params, state.update, decay=ema_decay)
    return dataclasses.replace(
      state, params=params, ema=ema, opt_state=opt_state, policy_copy=copy
    )

  return step


def make_reference_errors(
  denoise: Denoise,
  schedule: schedule_lib.NoiseSchedule,
  loss: ModuleType,
  *,
  arms: Sequence[str],
  prompt_dropout: float,
) -> Callable:
  """The reference's errors on fixed draws, as a jitted program.

  Returns:
    `errors(base, seed, uncond, batch)` -> errors by arm, float32 [B], for a batch with 'row'
    and 'draw', see `noising.make_arms`; the other arguments are those of `make_train_step`.
  """

  @jax.jit
  def errors(base, seed, uncond, batch):
    rows = batch_lib.make_arms(
      *(schedule, loss.NEEDS, batch, None, uncond),
      seed=seed,
      update=0,
      prompt_dropout=prompt_dropout,
    )
    return to_errors(_residuals(denoise, base, rows, arms))

  return errors


def _residuals(
  denoise: Denoise, params: Any, rows: batch_lib.Arms, arms: Sequence[str]
) -> dict[str, jax.Array]:
  """Predictions minus targets of the first arms, float32 [R, C, h, w], from one call."""
  count = len(arms)
  flat = lambda x: x[:, :count].reshape((-1, *x.shape[2:]))  # noqa: E731
  repeated = jax.tree.map(lambda c: jnp.repeat(c, count, axis=0), rows.cond)
  prediction = denoise(params, flat(rows.x_t), jnp.repeat(rows.t, count), repeated)
  residual = prediction.astype(jnp.float32) - flat(rows.target)
  residual = residual.reshape((-1, count, *residual.shape[1:]))
  return {arm: residual[:, i] for i, arm in enumerate(arms)}
