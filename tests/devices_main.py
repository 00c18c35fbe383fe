"""A program for test_steps.py: trains a toy model on meshes, prints metrics and sums as JSON.

python devices_main.py '[{"name": "dro", "data": 8}, ...]'
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses, sharding
from jaxpref.data import rows as rows_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.diffusion.schedule import make_schedule
from jaxpref.plan import tpu_compiler
from jaxpref.training import batch as batch_lib
from jaxpref.training import optimizer, step_rows, train_step
from jaxpref.training import rollout as rollout_lib

CHANNELS, SIZE, TOKENS, WIDTH, ROWS = 4, 4, 3, 8, 16
STEPS = 5  # of a trajectory


def denoise(params, x_t, t, cond):
  """Predicts with a small network instead of the UNet, because the tests cover the step."""
  hidden = jnp.einsum("bchw,cd->bdhw", x_t, params["in"])
  hidden += (cond.mean(1) @ params["cond"])[:, :, None, None]
  hidden += jnp.sin(t / 100.0)[:, None, None, None]
  return jnp.einsum("bdhw,dc->bchw", jnp.tanh(hidden), params["out"])


HYPER = {  # each method's settings, chosen so that they matter in this toy problem
  "awm": {"strength": 1.0, "clip": 0.1, "weight_reference": 0.1, "weight_old": 0.1},
  "csft": {},
  "dgpo": {"beta": 20.0, "clip": 0.1, "weight_reference": 0.1},
  "dpo": {"beta": 20.0, "variant": "sigmoid"},
  "dro": {"margin": 0.001},
  "dspo": {"beta": 0.5},
  "kto": {"beta": 20.0, "utility": "kt", "weight_desirable": 1.0, "weight_undesirable": 2.0},
  "listwise": {"beta": 20.0},
  "mapo": {"beta": 0.1, "snr": 0.5},
  "ppo": {
    "variant": "clipped",
    "clip": 1e-3,
    "density": "gaussian",
    "tie": "step",
    "weight_reference": 0.2,
  },
  "prdp": {"beta": 0.5, "clip": 0.01},
  "step_pairs": {"beta": 20.0, "clip": 0.1},
  "sdpo": {"beta": 20.0, "mu": 0.2, "guarded": "dpo"},
  "sft": {},
  "simpo": {"beta": 20.0, "target_margin": 0.5},
  "spin": {"beta": 20.0},
}


def initial(kind="experts", seed=0):
  """Samples parameters, rows and the empty prompt's embedding."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  params = {
    "in": draw(CHANNELS, 16),
    "cond": draw(WIDTH, 16),
    "out": 0.3 * draw(16, CHANNELS),
  }
  inner = {"steps": (2,), "step_pairs": (4,), "paths": (2, STEPS, 2)}.get(kind)
  inner = inner or (len(rows_lib.arms_of(kind, 3)),)
  rows = {
    "latents": draw(ROWS, *inner, CHANNELS, SIZE, SIZE),
    "cond": draw(ROWS, TOKENS, WIDTH),
    "labels": {"desirable": rng.random(ROWS) < 0.7},
  }
  if kind in ("scored", "groups"):
    rows["labels"] = {"advantage": draw(ROWS, *(inner if kind == "groups" else ()))}
  if kind == "steps":
    rows["labels"] = {"advantage": draw(ROWS), **step_labels()}
  if kind == "step_pairs":
    both = {name: np.repeat(x[:, None], 2, axis=1) for name, x in step_labels().items()}
    rows["labels"] = {"advantage": draw(ROWS, 2), "reward": draw(ROWS, 2), **both}
  if kind == "paths":
    of = {
      name: np.broadcast_to(x[:STEPS], (ROWS, 2, STEPS)) for name, x in step_labels().items()
    }
    rows["labels"] = {"advantage": draw(ROWS, 2), **of}
  return params, rows, draw(1, TOKENS, WIDTH)


def step_labels():
  """Returns the coefficients of the first steps of DDIM with noise."""
  grid = timesteps_lib.uniform_grid(make_schedule(), 20, 1, visit_lowest=True)
  table = sampler_lib.coefficients(grid, solver="ddim", eta=1.0)
  taken = step_rows.take(
    *(jnp.zeros((20, 1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), grid, table),
    *(make_schedule(), jnp.arange(ROWS)[None]),
  )
  return jax.tree.map(lambda x: np.asarray(x[0]), taken.labels)


def train(
  name,
  *,
  data=1,
  fsdp=1,
  accumulate=1,
  refresh_every=1,
  updates=3,
  own=False,
  states=1,
  replay=0,
  lots=0,
  fixed=False,
  posterior=False,
  seed=0,
  collectives=None,
  **hyper,
):
  """Trains for a few updates; returns the metrics of each update and the parameters."""
  mesh = sharding.make_mesh(data=data, fsdp=fsdp)
  loss = losses.make_loss({"name": name, **HYPER[name], **hyper}, updates=refresh_every)
  needs = loss.needs
  params, rows, empty = initial(needs.rows)
  arms = rows_lib.arms_of(needs.rows, 3) + (("p",) if needs.rollout else ())
  schedule = make_schedule()
  learning_rate = optimizer.make_schedule("constant", lr=1e-2, warmup_updates=0, num_updates=9)
  tx = optimizer.make_optimizer(learning_rate)
  lagging, shared = train_step.needs_copy(needs, refresh_every), {"prompt_dropout": 0.2}

  def make_state(p):
    buffer = None
    if replay:
      drawn = rollout_lib.States(
        *(jnp.zeros((ROWS, states, CHANNELS, SIZE, SIZE)) for _ in range(2)),
        jnp.zeros((ROWS, states), jnp.int32),
      )
      example = batch_lib.make_arms(
        schedule, needs, rows, drawn, empty, seed=0, update=0, **shared
      )
      buffer = rollout_lib.init_replay(example, replay)
    return train_step.init_state(p, tx, seed=seed, lagging_copy=lagging, replay=buffer)

  # `min_bytes=0` also shards small tensors.
  split = sharding.params_sharding(mesh, jax.eval_shape(make_state, params), min_bytes=0)
  step = train_step.make_train_step(
    *(denoise, schedule, loss, tx),
    mesh=mesh,
    state_sharding=split,
    arms=arms,
    learning_rate=learning_rate,
    ema_decay=0.99,
    accumulate=accumulate,
    refresh_every=refresh_every,
    copy_decay=(lambda done: 0.1 * done) if needs.old else None,
    own_targets=own,
    guidance=2.0 if needs.of_steps else 1.0,
    **shared,
  )
  rollout = rollout_lib.make_rollout(
    denoise,
    schedule,
    mesh=mesh,
    latent_shape=(CHANNELS, SIZE, SIZE),
    num_steps=4,
    solver="dpm_solver",
    order=2,
    guidance=1.0,
    states_per_trajectory=states,
    batch_size=lots,
    **shared,
  )
  params = jax.device_put(params, split.params)
  state = jax.jit(make_state, out_shardings=split)(params)
  if fixed:
    numbers = {"row": np.arange(ROWS, dtype=np.int32), "draw": np.ones(ROWS, np.int32)}
    rows |= numbers
    if fixed == "known":
      errors = train_step.make_reference_errors(denoise, schedule, loss, arms=arms, **shared)
      rows |= {"ref": jax.tree.map(np.asarray, errors(params, seed, empty, rows))}
  if posterior:
    rows |= {"std": np.full_like(rows["latents"], 0.5)}
  batch = sharding.place_batch(rows, mesh)
  empty = jax.device_put(empty, sharding.replicated(mesh))
  history = []
  if collectives is not None:
    first = rollout(state.params, state.seed, state.update, batch["cond"], empty)
    drawn = first if needs.rollout else None
    text = step.lower(state, params, empty, batch, drawn).compile().as_text()
    collectives.update(tpu_compiler.collectives(text))
  for _ in range(updates):
    drawn = None
    if needs.rollout:
      policy = state.policy_copy if lagging else state.params
      drawn = rollout(policy, state.seed, state.update, batch["cond"], empty)
    start = params if name == "spin" else None
    state, metrics = step(state, params, empty, batch, drawn, start, empty)
    history.append({k: float(v) for k, v in metrics.items()})
  pieces = {len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(state)}
  assert max(pieces) == fsdp, (pieces, fsdp)
  return history, jax.tree.map(np.asarray, state.params)


if __name__ == "__main__":
  results = []
  for case in json.loads(sys.argv[1]):
    collectives = {} if case.pop("look", False) else None
    history, params = train(**case, collectives=collectives)
    flat = [float(np.sum(v.astype(np.float64))) for v in jax.tree.leaves(params)]
    results.append(
      {
        "devices": jax.device_count(),
        "history": history,
        "sums": flat,
        "collectives": collectives,
      }
    )
  print(json.dumps(results))
