"""An update of a step-aware preference model on a mesh, for test_step_judge.py.

python step_reward_main.py PIPELINE DATA FSDP

Prints JSON, see `train`.
"""

import json
import sys

import jax
import numpy as np

from jaxpref import config as config_lib
from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.training import programs, run_state, setup

ROWS = 16


def train(path, *, data, fsdp):
  """Trains for two updates on random latents, with all parameters split over `fsdp`.

  Returns:
    Metrics of the updates, and the sums of the trained parameters' squares.
  """
  config = config_lib.load_config("step_reward:tiny")
  config.model.path, config.train.batch_size, config.train.accumulate = path, ROWS, 2
  config.mesh.data, config.mesh.fsdp, config.judge.at_once = data, fsdp, 3
  checked = setup.check(config)
  pipeline, mesh = checked.pipeline, checked.mesh
  captions = [f"{n} {color} circles" for n in ("two", "three") for color in ("red", "blue")] * 4
  rng = np.random.default_rng(0)
  rows = {
    "latents": rng.standard_normal((ROWS, 2, *pipeline.latent_shape)).astype(np.float32),
    "cond": encode.encode_prompts(pipeline, mesh, captions),
    "labels": {"desirable": np.ones(ROWS, bool)},
  }
  empty = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  base = pipeline.params.pop("unet")
  trained = run_state.initial_params(checked, pipeline.params.pop("scorer"))
  program = programs.make_programs(checked, trained, empty)
  state = jax.jit(program.make_state, out_shardings=program.placement)(trained)
  split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
  assert (split > 0) == (fsdp > 1)
  frozen = run_state.freeze(checked, base)
  batch, history = sharding.place_batch(rows, mesh), []
  for _ in range(2):
    state, metrics = program.train_step(state, frozen, empty, batch, None, None, empty)
    history.append({name: float(value) for name, value in metrics.items()})
  squares = {
    jax.tree_util.keystr(path): float(np.square(x, dtype=np.float64).sum())
    for path, x in jax.tree_util.tree_leaves_with_path(sharding.to_host(state.params))
  }
  return {"devices": jax.device_count(), "history": history, "squares": squares}


if __name__ == "__main__":
  sharding.params_sharding.__kwdefaults__["min_bytes"] = 0  # small tensors are split too
  print(json.dumps(train(sys.argv[1], data=int(sys.argv[2]), fsdp=int(sys.argv[3]))))
