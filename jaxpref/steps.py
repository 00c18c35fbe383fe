"""The train step of every method: noise, denoise policy and reference, loss, update.

One jitted, donated program over the mesh. Policy and reference go through the same
`denoise`, all arms of a batch in one call each.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import optim, randomness, sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.models.unet import Denoise
from jaxpref.rollouts import Rollout


@flax.struct.dataclass
class TrainState:
  """All that a checkpoint must hold.

  Attributes:
    params: the policy, float32.
    ema: its moving average, float32.
    opt_state: of optax.
    policy_copy: the policy that rolls out, where it lags behind; None where it does not.
    update: number of updates done, int32 scalar.
  """

  params: Any
  ema: Any
  opt_state: Any
  policy_copy: Any
  update: jax.Array


def init_state(
  params: Any, tx: optax.GradientTransformation, *, lagging_copy: bool
) -> TrainState:
  """The state before the first update; `lagging_copy` if rollouts need a copy."""
  return TrainState(
    # Copies throughout: the state is donated, and `params` may live on as the reference.
    params=jax.tree.map(jnp.copy, params),
    ema=jax.tree.map(jnp.copy, params),
    opt_state=tx.init(params),
    policy_copy=jax.tree.map(jnp.copy, params) if lagging_copy else None,
    update=jnp.zeros((), jnp.int32),
  )


def make_train_step(
  denoise: Denoise,
  schedule: schedule_lib.NoiseSchedule,
  loss: ModuleType,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh,
  state_sharding: Any,
  seed: int,
  hyper: Mapping[str, Any],
  ema_decay: float,
  prompt_dropout: float,
  accumulate: int = 1,
  refresh_every: int = 1,
  own_targets: bool = False,
) -> Callable:
  """One update as a jitted program.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: noise schedule.
    loss: a module with the contract of `jaxpref.losses`.
    tx: optimizer.
    mesh: from `sharding.make_mesh`.
    state_sharding: of a `TrainState`, for the new state as for the old: a resumed run must
      compile to the program of an uninterrupted one.
    seed: of the run.
    hyper: the loss's hyper-parameters.
    ema_decay: limit of the moving average's decay.
    prompt_dropout: share of rows trained without their prompt.
    accumulate: micro-batches; gradients cross the mesh's `data` axis once, after the last.
    refresh_every: updates after which the lagging policy copy is renewed, if there is one.
    own_targets: whether a rollout's targets are what the policy itself predicts at this
      update (refreshed at every one, no guidance). Its error there is 0 and so is the
      gradient: neither is computed, which halves the policy's part of the work.

  Returns:
    `step(state, ref, uncond, batch, rollout) -> (state, metrics)`; `ref` is the
    reference's parameters or None, `batch` {'latents': [B, C, h, w], 'cond': tree of [B, ...]},
    `rollout` a `Rollout` or None, metrics are scalars.
  """

  def arms_of(batch, rollout: Rollout | None, update, uncond):
    """Rows by arm: x_t, t, target, and the prompts that all arms share."""
    key = randomness.key_of(seed, "train", update)
    x0 = batch["latents"]
    cond = randomness.drop_prompts(seed, update, batch["cond"], uncond, rate=prompt_dropout)
    if rollout is None:
      t = jax.random.randint(
        jax.random.fold_in(key, 0), x0.shape[:1], 0, schedule.num_timesteps
      )
    else:
      t = rollout.t
    eps = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
    x_t = [schedule_lib.add_noise(schedule, x0, eps, t)]
    target = [schedule_lib.target(schedule, x0, eps, t)]
    if rollout is not None:
      x_t.append(rollout.x_t)
      target.append(rollout.target)
    # Arms on axis 1, so that splitting rows over devices keeps pairs together.
    return jnp.stack(x_t, 1), jnp.stack(target, 1), t, cond

  def errors(params, arms, x_t, target, t, cond):
    """Denoising errors of the first `arms` arms, each [B], from one forward pass."""
    flat = lambda x: x[:, :arms].reshape((-1, *x.shape[2:]))  # noqa: E731
    repeated = jax.tree.map(lambda c: jnp.repeat(c, arms, axis=0), cond)
    prediction = denoise(params, flat(x_t), jnp.repeat(t, arms), repeated)
    err = schedule_lib.denoising_error(prediction, flat(target)).reshape((-1, arms))
    return {arm: err[:, i] for i, arm in enumerate(loss.ARMS[:arms])}

  def micro_loss(params, ref, rows):
    arms = len(loss.ARMS)
    err = errors(params, arms - own_targets, *rows)
    if own_targets:
      err[loss.ARMS[-1]] = jnp.zeros_like(err[loss.ARMS[0]])
    err_ref = {}
    if loss.REFERENCE:
      err_ref = jax.lax.stop_gradient(errors(ref, arms, *rows))
    per_sample, metrics = loss.objective(err, err_ref, **hyper)
    metrics = {
      "loss": per_sample,
      **{f"err/policy_{a}": e for a, e in err.items()},
      **{f"err/reference_{a}": e for a, e in err_ref.items()},
      **metrics,
    }
    return per_sample.mean(), jax.tree.map(jnp.mean, metrics)

  def mean_gradients(params, ref, rows):
    """Gradients and metrics of this device's rows, micro-batch by micro-batch."""
    gradients = jax.grad(micro_loss, has_aux=True)
    if accumulate == 1:
      return gradients(params, ref, rows)

    def add(total, micro):
      return jax.tree.map(jnp.add, total, gradients(params, ref, micro)), None

    micros = jax.tree.map(lambda x: x.reshape((accumulate, -1, *x.shape[1:])), rows)
    shapes = jax.eval_shape(gradients, params, ref, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda x: x / accumulate, total)

  reduced_gradients = jax.shard_map(
    lambda *arguments: jax.lax.pmean(mean_gradients(*arguments), "data"),
    mesh=mesh,
    in_specs=(P(), P(), P("data")),
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
  def step(state: TrainState, ref, uncond, batch, rollout):
    rows = arms_of(batch, rollout, state.update, uncond)
    grads, metrics = reduced_gradients(state.params, ref, rows)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    update = state.update + 1
    copy = state.policy_copy
    if copy is not None:
      renew = update % refresh_every == 0
      copy = jax.tree.map(lambda c, p: jnp.where(renew, p, c), copy, params)
    new = TrainState(
      params=params,
      ema=optim.update_ema(state.ema, params, state.update, decay=ema_decay),
      opt_state=opt_state,
      policy_copy=copy,
      update=update,
    )
    return new, {**metrics, "optim/grad_norm": optax.global_norm(grads)}

  return step
