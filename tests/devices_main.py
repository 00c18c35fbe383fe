"""Three updates of a method on a mesh; prints losses and a digest as JSON. For test_steps."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses, optim, rollouts, sharding, steps
from jaxpref.diffusion.schedule import make_schedule

CHANNELS, SIZE, TOKENS, WIDTH, ROWS = 4, 4, 3, 8, 16


def denoise(params, x_t, t, cond):
  """A small network in place of the UNet: what is tested here is everything around it."""
  hidden = jnp.einsum("bchw,cd->bdhw", x_t, params["in"])
  hidden += (cond.mean(1) @ params["cond"])[:, :, None, None]
  hidden += jnp.sin(t / 100.0)[:, None, None, None]
  return jnp.einsum("bdhw,dc->bchw", jnp.tanh(hidden), params["out"])


def initial(seed=0):
  """Parameters, rows and the empty prompt's embedding."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {
    "in": draw(CHANNELS, 16),
    "cond": draw(WIDTH, 16),
    "out": 0.3 * draw(16, CHANNELS),
  }
  rows = {"latents": draw(ROWS, CHANNELS, SIZE, SIZE), "cond": draw(ROWS, TOKENS, WIDTH)}
  return params, rows, draw(1, TOKENS, WIDTH)


def train(name, *, data, fsdp, accumulate, refresh_every=1, updates=3, own=False):
  """Losses by update, the last metrics, and the parameters."""
  mesh = sharding.make_mesh(data=data, fsdp=fsdp)
  params, rows, empty = initial()
  loss = losses.load_loss(name)
  schedule = make_schedule()
  tx = optim.make_optimizer(
    optim.make_schedule("constant", lr=1e-2, warmup_updates=0, num_updates=9)
  )
  lagging = loss.ROLLOUT and refresh_every > 1
  make_state = lambda p: steps.init_state(p, tx, lagging_copy=lagging)  # noqa: E731
  # Every tensor is split here that can be, however small.
  split = sharding.params_sharding(mesh, jax.eval_shape(make_state, params), min_bytes=0)
  step = steps.make_train_step(
    denoise,
    schedule,
    loss,
    tx,
    mesh=mesh,
    state_sharding=split,
    seed=0,
    hyper=dict.fromkeys(loss.HYPER, 0.001),
    ema_decay=0.99,
    prompt_dropout=0.2,
    accumulate=accumulate,
    refresh_every=refresh_every,
    own_targets=own,
  )
  rollout = rollouts.make_rollout(
    denoise,
    schedule,
    seed=0,
    latent_shape=(CHANNELS, SIZE, SIZE),
    num_steps=4,
    solver="dpm_solver",
    order=2,
    guidance=1.0,
    prompt_dropout=0.2,
  )
  params = jax.device_put(params, split.params)
  state = jax.jit(make_state, out_shardings=split)(params)
  ref = params if loss.REFERENCE else None
  batch = sharding.place_batch(rows, mesh)
  empty = jax.device_put(empty, sharding.replicated(mesh))
  history = []
  for _ in range(updates):
    negatives = None
    if loss.ROLLOUT:
      policy = state.policy_copy if lagging else state.params
      negatives = rollout(policy, state.update, batch["cond"], empty)
    state, metrics = step(state, ref, empty, batch, negatives)
    history.append({k: float(v) for k, v in metrics.items()})
  pieces = {len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(state)}
  assert max(pieces) == fsdp, (pieces, fsdp)
  return history, jax.tree.map(np.asarray, state.params)


if __name__ == "__main__":
  name, data, fsdp, accumulate = sys.argv[1:5]
  history, params = train(name, data=int(data), fsdp=int(fsdp), accumulate=int(accumulate))
  flat = [float(np.sum(v.astype(np.float64))) for v in jax.tree.leaves(params)]
  print(json.dumps({"devices": jax.device_count(), "history": history, "sums": flat}))
