"""An update of training through the sampler, with networks of a few numbers.

As a program, it prints what updates on the meshes of its arguments give, as JSON.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpref import losses, scorers, sharding
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.training import pathwise_step, train_step
from jaxpref.training.judge import Judge

SHAPE, ROWS, STEPS = (2, 3, 3), 8, 4
SCHEDULE = schedule_lib.make_schedule()
SPACING = {"steps_offset": 1, "visit_lowest": True, "final": "sigma_min"}
PIPELINE = types.SimpleNamespace(
  latent_shape=SHAPE, schedule=SCHEDULE, spacing=lambda solver: SPACING
)
PATH = pathwise_step.Path(
  *("last", STEPS, 3.0, 0.0, 2, 0.0, 0.0, 2, 0, 1)
)  # method, steps, guidance, eta, last, mean, std, repeats, first, end


class Vae:
  """A decoder of one matrix."""

  scaling_factor, shift_factor = 0.5, 0.1

  def apply(self, variables, latents, method):
    assert method == "pixels"
    return jnp.tanh(jnp.einsum("bchw,cd->bdhw", latents, variables["params"]))


def denoise(params, x_t, t, cond):
  """A prediction that depends on everything; it also changes with the neighbours."""
  mixed = jnp.einsum("bchw,cd->bdhw", x_t, params["mix"])
  level = schedule_lib.per_sample(t / 1000.0, x_t)
  return jnp.tanh(mixed + params["bias"] * level + cond["text"][:, :, None, None])


def score(params, images, tokens):
  """A smooth score of images in [0, 1]."""
  channel = jnp.einsum("bhwd,bd->bhw", images, tokens["weight"])
  return jnp.mean(jnp.sin(params * channel), axis=(1, 2)) * 5


def tokenize(prompts):
  return {"weight": np.array([[len(p), 1.0] for p in prompts], np.float32)}


def random(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {"mix": 0.6 * random(0, 2, 2), "bias": random(1, 2, 1, 1)}
VAE_PARAMS, SCORER_PARAMS = random(2, 2, 2), np.float32(1.3)
COND = {"text": 0.5 * random(3, ROWS, 2)}
GUIDE = {"text": 0.5 * random(4, 1, 2)}
TOKENS = {"toy": {"weight": random(5, ROWS, 2)}}
SEEDS = np.arange(ROWS, dtype=np.uint32) + 2**31


def judge_of(at_once=2):
  return Judge({"toy": scorers.Reward(SCORER_PARAMS, tokenize, score)}, (0.7,), Vae(), at_once)


def update(path=PATH, *, loss=None, accumulate=1, updates=1, data=1, fsdp=1):
  """Trains with plain gradient descent at a rate of 1; returns parameters and metrics."""
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
  settings = {"name": "reward", "variant": "linear", "target": 0.0, "scale": 1.0}
  tx, judge = optax.sgd(1.0), judge_of()
  state = train_step.init_state(PARAMS, tx, seed=3, lagging_copy=False)
  placement = sharding.params_sharding(mesh, state, min_bytes=8)
  state = jax.device_put(state, placement)
  step = pathwise_step.make_pathwise_step(
    *(denoise, PIPELINE, judge, losses.make_loss(settings | (loss or {})), tx, path),
    mesh=mesh,
    state_sharding=placement,
    learning_rate=lambda done: 1.0,
    ema_decay=0.9,
    accumulate=accumulate,
  )
  rows = sharding.place_batch({"cond": COND, "tokens": TOKENS, "seed": SEEDS}, mesh)
  batch = {
    "rows": rows,
    "judge": sharding.replicate({"vae": VAE_PARAMS, "scorers": {"toy": SCORER_PARAMS}}, mesh),
    "guide": sharding.replicate(GUIDE, mesh) if path.guidance > 1 else None,
  }
  history = []
  for _ in range(updates):
    state, metrics = step(state, None, None, batch, None)
    history.append({name: float(value) for name, value in metrics.items()})
  return jax.tree.map(np.asarray, state.params), history


if __name__ == "__main__":
  found = []
  for case in json.loads(sys.argv[1]):
    method = PATH._replace(**case.pop("path"))
    params, history = update(method, updates=2, **case)
    params = {name: value.tolist() for name, value in params.items()}
    found.append({"devices": len(jax.devices()), "params": params, "history": history})
  print(json.dumps(found))
