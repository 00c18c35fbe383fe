"""A UNet whose parameters are split over devices, against one whose are not; for test_unet.

python split_main.py PIPELINE denoiser|reward

Prints the gradients' relative error and the messages of the compiled program as JSON.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import sharding
from jaxpref.models import pipeline, reward_model, unet
from jaxpref.plan import tpu_compiler


def make_loss(loaded, kind, mesh):
  """Makes (params, x_t, t, cond) -> a number, of the UNet or of a reward model made of it."""
  if kind == "reward":
    score = reward_model.make_score(loaded, guidance=3.0, mesh=mesh)
    empty = {"text": np.ones((1, 16, 16), np.float32)}
    return lambda *given: score(*given, empty).sum()
  denoise = unet.make_denoise(loaded.modules["unet"], mesh=mesh)
  return lambda *given: jnp.square(denoise(*given)).sum()


def main(path: str, kind: str) -> None:
  """Loss and gradients on four devices, each with half of every parameter, and on one."""
  loaded = pipeline.load_pipeline(path)
  params = loaded.params["unet"]
  if kind == "reward":
    params = reward_model.init_params(loaded, params, jax.random.key(0), width=64)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  inputs = draw(4, *loaded.latent_shape), np.array([5, 700, 2, 30]), {"text": draw(4, 16, 16)}

  def program(mesh, shardings):
    return jax.jit(jax.grad(make_loss(loaded, kind, mesh)), out_shardings=shardings)

  mesh = sharding.make_mesh(data=2, fsdp=2)
  where = sharding.params_sharding(mesh, params, min_bytes=0)
  placed = jax.tree.map(jax.device_put, params, where)
  rows = sharding.place_batch(inputs, mesh)
  compiled = program(mesh, where).lower(placed, *rows).compile()
  split = sum(not s.is_fully_replicated for s in jax.tree.leaves(where))
  want, got = program(None, None)(params, *inputs), compiled(placed, *rows)
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
  got, want = flat(sharding.to_host(got)), flat(want)
  found = {
    "error": float(np.abs(got - want).max() / np.abs(want).max()),
    "split": split,
    "of": len(jax.tree.leaves(where)),
    "messages": tpu_compiler.collectives(compiled.as_text()),
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2])
