"""What is done to the UNet from outside."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, WITHOUT_TORCH, xla_flags
from diffusers.models.attention_flax import FlaxTransformer2DModel

from jaxpref.errors import UserError
from jaxpref.models import denoiser, interceptors, pipeline, unet


@pytest.mark.long
def test_a_widened_input_is_ignored_until_it_is_trained(tiny_pipeline):
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  improver = pipeline.widen(loaded)
  assert improver.configs["unet"]["in_channels"] == 8 and improver.is_improver
  assert loaded.configs["unet"]["in_channels"] == 4 and not loaded.is_improver
  assert improver.latent_shape == loaded.latent_shape and pipeline.widen(improver) is improver
  shapes = jax.tree.map(np.shape, pipeline.abstract_params(improver.modules["unet"]))
  wide_params = improver.params["unet"]
  assert jax.tree.map(np.shape, wide_params) == shapes
  rng = np.random.default_rng(0)
  x, image = rng.standard_normal((2, 2, *loaded.latent_shape)).astype(np.float32)
  t, cond = np.array([5, 700]), {"text": rng.standard_normal((2, 16, 16)).astype(np.float32)}
  plain = jax.jit(unet.make_denoise(loaded.modules["unet"]))(loaded.params["unet"], x, t, cond)
  denoise = jax.jit(unet.make_denoise(improver.modules["unet"]))
  for given in (np.zeros_like(image), image, 100 * image):
    out = denoise(wide_params, x, t, {**cond, "image": given})
    np.testing.assert_allclose(out, plain, atol=1e-6)

  def error(p):
    return jnp.square(denoise(p, x, t, {**cond, "image": image})).mean()

  grads = jax.grad(error)(wide_params)
  assert np.abs(grads["conv_in"]["kernel"][:, :, 4:]).max() > 0  # it can learn
  with pytest.raises(ValueError, match="cannot widen"):
    denoiser.widen_input(wide_params, "conv_in", 8)


@pytest.mark.parametrize("field", ["down_block_types", "up_block_types", "mid_block_type"])
def test_unknown_blocks_are_named(tiny_pipeline, field):
  config = pipeline.load_pipeline(str(tiny_pipeline)).configs["unet"]
  with pytest.raises(UserError, match=f"{field}: 'Foo' is not one of"):
    unet.build_unet({**config, field: "Foo"}, dtype=jnp.float32)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frozen_copy_answers_bit_for_bit(tiny_pipeline, dtype):
  loaded = pipeline.load_pipeline(str(tiny_pipeline), dtype=jnp.dtype(dtype))
  params = jax.tree.map(jnp.asarray, loaded.params["unet"])
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  inputs = draw(2, *loaded.latent_shape), np.array([5, 700]), {"text": draw(2, 16, 16)}
  denoise = jax.jit(unet.make_denoise(loaded.modules["unet"]))
  frozen = denoiser.freeze(params, dtype)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
  assert size(frozen) / size(params) < {"float32": 1.01, "bfloat16": 0.52}[dtype]
  np.testing.assert_array_equal(denoise(frozen, *inputs), denoise(params, *inputs))


def test_a_transformers_norm_has_pytorchs_epsilon():
  """Seen where the input is so faint that epsilon counts."""
  module = FlaxTransformer2DModel(in_channels=32, n_heads=1, d_head=32, depth=0)
  x = 1e-3 * np.random.default_rng(0).standard_normal((1, 4, 4, 32)).astype(np.float32)
  params = module.init(jax.random.key(0), x, None)["params"]
  eye = {"kernel": jnp.eye(32)[None, None], "bias": jnp.zeros(32)}
  params = {**params, "proj_in": eye, "proj_out": eye}
  with nn.intercept_methods(interceptors.transformer_norm):
    out = module.apply({"params": params}, x, None)
  grouped = np.float64(x)  # groups of one channel each
  mean, var = grouped.mean((1, 2), keepdims=True), grouped.var((1, 2), keepdims=True)
  np.testing.assert_allclose(out, x + (grouped - mean) / np.sqrt(var + 1e-6), rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "whole"), [("denoiser", 0), ("reward", 1)])  # a scale
def test_parameters_that_are_split_are_gathered_once_each(tiny_pipeline, kind, whole):
  """And nothing else moves but the gradients: each device computes its rows."""
  done = subprocess.run(
    [sys.executable, ROOT / "tests" / "split_main.py", str(tiny_pipeline), kind],
    check=False,
    env=os.environ | {"XLA_FLAGS": xla_flags(devices=4)} | WITHOUT_TORCH,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["error"] < 1e-5 and found["split"] == found["of"] - whole > 50
  assert set(found["messages"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
  assert found["messages"]["all-gather"]["count"] == found["split"]
