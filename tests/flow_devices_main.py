"""A program for test_flow_devices.py: updates of narrow SD3.5 and SANA, on any devices.

python -m tests.flow_devices_main '{"sd35m": DIRECTORY, ...}' '[{"method": "dro", ...}, ...]'
"""

import functools
import json
import re
import sys

import jax
import numpy as np

from jaxpref import config as config_lib
from jaxpref import sharding
from jaxpref.training import programs, setup

ROWS = 16


def train(directories, *, method, preset, rank=0, data=1, fsdp=1, updates=2):
  """Trains by a preset's programs for a few updates on random rows.

  Returns:
    The metrics of each update, a sum of each trained tensor, and the shapes that a step
    gathers, reduces and exchanges between devices.
  """
  fields = {
    "model.path": directories[preset],
    "model.image_size": 0,
    **dict.fromkeys(("model.dtype", "model.frozen_dtype"), "float32"),
    "lora.rank": rank,
    **{"mesh.data": data, "mesh.fsdp": fsdp},
    **{"train.batch_size": ROWS, "train.accumulate": 2},
    **{"rollout.num_steps": 2, "rollout.batch_size": 0},
    **{"optim.lr": 1e-3, "optim.warmup_updates": 0},
  }
  arguments = [f"--config.{name}={value}" for name, value in fields.items()]
  config, _ = config_lib.parse_args([f"--config={method}:{preset}", *arguments], flags={})
  mesh = sharding.make_mesh(data=data, fsdp=fsdp)
  checked = setup.check(config)
  pipeline = checked.pipeline
  rng = np.random.default_rng(0)
  rows, uncond = (
    jax.tree.map(lambda x: _draw(rng, x), programs.abstract_rows(checked, n)) for n in (ROWS, 1)
  )
  batch = sharding.place_batch(rows, mesh)
  uncond = jax.device_put(uncond["cond"], sharding.replicated(mesh))
  base = pipeline.denoiser_params
  begin = setup.init_trained(config, pipeline, base)
  program = programs.make_programs(checked, begin, uncond)
  state = jax.jit(program.make_state, out_shardings=program.placement)(begin)
  frozen = programs.kept_base(checked, base)
  history, step = [], None
  for _ in range(updates):
    states = None
    if program.rollout:
      given = programs.rollout_arguments(program, state, frozen, batch["cond"], uncond)
      states = program.rollout(*given)
    arguments = (state, frozen, uncond, batch, states, None)
    step = step or program.train_step.lower(*arguments).compile()
    state, metrics = step(*arguments)
    history.append({name: float(value) for name, value in metrics.items()})
  pieces = {len({str(s.index) for s in x.addressable_shards}) for x in jax.tree.leaves(state)}
  assert max(pieces) == fsdp, (pieces, fsdp)
  sums = [
    float(np.abs(x).sum(dtype=np.float64))
    for x in map(np.asarray, jax.tree.leaves(state.params))
  ]
  return history, sums, [_shapes(step.as_text(), of) for of in ("gather", "reduce", "to-all")]


def _shapes(text, operation):
  """Returns the shapes of the results of all messages of a kind."""
  results = re.findall(rf"= (.*?) all-{operation}(?:-start)?\(", text)
  return [
    [int(n) for n in shape.split(",") if n]
    for result in results
    for shape in re.findall(r"\[([\d,]*)\]", result)
  ]


def _draw(rng, leaf):
  """Draws latents, texts and their masks; labels are true or false."""
  if leaf.dtype == bool:
    return rng.random(leaf.shape) < 0.5
  if np.issubdtype(leaf.dtype, np.integer):  # a mask, of which the first token is always seen
    return np.maximum(rng.integers(0, 2, leaf.shape), np.arange(leaf.shape[-1]) == 0).astype(
      leaf.dtype
    )
  return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def split_small_tensors():
  """Lets FSDP split tensors of any size, because those of narrow networks are small."""
  sharding.params_sharding = functools.partial(sharding.params_sharding, min_bytes=0)


if __name__ == "__main__":
  split_small_tensors()
  directories = json.loads(sys.argv[1])
  print(json.dumps([train(directories, **case) for case in json.loads(sys.argv[2])]))
