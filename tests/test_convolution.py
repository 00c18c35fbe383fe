"""Convolutions for loops on CPUs: JAX's values and gradients, in the layout with fast code."""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.models import convolution, lora, pipeline, preference_towers, unet
from jaxpref.models import vae as vae_lib
from jaxpref.training import flops

LAYOUT = ("NHWC", "HWIO", "NHWC")
PADDINGS = ("SAME", "VALID", ((0, 1), (1, 0)), ((2, 1), (0, 2)))
FAST = "b01f_01io->b01f"


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def own(x, kernel, strides, padding):
  """Returns JAX's convolution."""
  return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)])
def test_gradients_are_jaxs_own(in_float64, size, strides, padding):
  x, kernel = jnp.asarray(draw(3, 8, 9, 5)), jnp.asarray(draw(*size, 5, 6, seed=1))

  def gradients(convolve):
    loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, strides, padding)))  # noqa: E731
    return jax.value_and_grad(loss, (0, 1))(x, kernel)

  got, want = map(gradients, (convolution.convolve, own))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, want)


def test_gradients_keep_bfloat16():
  x, kernel = (
    jnp.asarray(draw(*shape), jnp.bfloat16) for shape in ((3, 8, 9, 5), (3, 3, 5, 6))
  )

  def gradients(convolve):
    loss = lambda x, kernel: jnp.sum(convolve(x, kernel, (2, 2), "SAME"))  # noqa: E731
    return jax.grad(loss, (0, 1))(x, kernel)

  for got, want in zip(gradients(convolution.convolve), gradients(own), strict=True):
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0.02, atol=0.05)


def test_gradients_of_each_row(in_float64):
  """Mapped over rows, as of scorers that see one image at a time."""
  rows, kernel = jnp.asarray(draw(3, 2, 6, 6, 4)), jnp.asarray(draw(3, 3, 4, 5, seed=1))

  def gradients(convolve):
    loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, (2, 2), "SAME")))  # noqa: E731
    return jax.vmap(jax.grad(loss, (0, 1)), (0, None))(rows, kernel)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
    *(gradients(convolve) for convolve in (convolution.convolve, own)),
  )


@pytest.mark.parametrize("wanted", [0, 1, (0, 1)])
def test_what_is_not_asked_for_is_not_computed(wanted):
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))

  def count(convolve):
    loss = lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, (2, 2), "SAME")))  # noqa: E731
    return flops.count(jax.make_jaxpr(jax.grad(loss, wanted))(x, kernel).jaxpr)

  assert count(convolution.convolve) == count(own)


def test_other_devices_compute_jaxs_own():
  layer = nn.Conv(8, (3, 3))
  x = jnp.ones((2, 8, 8, 4))
  params = layer.init(jax.random.key(0), x)

  def program(context):
    def loss(params):
      with context:
        return layer.apply(params, x).sum()

    return str(jax.make_jaxpr(jax.grad(loss))(params))

  unchanged = program(contextlib.nullcontext())
  assert program(convolution.fast_in_loops("cpu")) != unchanged
  assert program(convolution.fast_in_loops("gpu")) == unchanged


def compiled_layouts(function, *arguments):
  """Returns the layouts of convolutions in the loop of a program that sums two gradients."""

  def twice(*arguments):
    add = lambda total, _: (jax.tree.map(jnp.add, total, function(*arguments)), None)  # noqa: E731
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *arguments))
    return jax.lax.scan(add, zeros, jnp.arange(2))[0]

  text = jax.jit(twice).lower(*arguments).compile().as_text()
  found = re.findall(r" convolution\(.*dim_labels=([^\s,]+)", text)
  assert " while(" in text
  assert found
  return set(found)


def test_the_denoisers_gradients_have_fast_code_in_loops(tiny_pipeline, monkeypatch):
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  denoise = unet.make_denoise(loaded.modules["unet"])
  params = jax.tree.map(jnp.asarray, loaded.params["unet"])
  width = loaded.configs["unet"]["cross_attention_dim"]
  x = jnp.ones((2, *loaded.latent_shape))
  given = x, jnp.array([5, 700]), {"text": jnp.ones((2, 16, width))}
  additions = lora.init_lora(params, rank=2, targets=r"conv1$", key=jax.random.key(0))
  adapted = lora.Adapted(params, additions, 1.0)
  gradient = jax.grad(lambda params: jnp.mean(jnp.square(denoise(params, *given))))
  for trained in (params, adapted):
    assert compiled_layouts(gradient, trained) == {FAST}
  monkeypatch.setattr(convolution, "fast_in_loops", lambda _: contextlib.nullcontext())
  assert compiled_layouts(gradient, params) > {FAST}


def test_rewards_gradients_have_fast_code_in_loops(tiny_pipeline):
  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  params = jax.tree.map(jnp.asarray, loaded.params["vae"])
  towers = preference_towers.build_towers(
    {"image_size": 16, "channels": [8, 16], "width": 8, "text_config": {}}
  )
  tower = towers.image.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]

  def score(latents):
    pixels = vae_lib.decode_unit(loaded.modules["vae"], params, latents).transpose(0, 2, 3, 1)
    shape = (len(latents), 16, 16, 3)
    small = jax.image.resize(pixels, shape, "linear")
    return preference_towers.image_features(towers, {"image": tower}, small).sum()

  assert compiled_layouts(jax.grad(score), jnp.ones((2, *loaded.latent_shape))) == {FAST}


@pytest.mark.parametrize("options", [{"feature_group_count": 4}, {"kernel_dilation": 2}])
def test_other_layers_keep_their_convolution(options):
  layer = nn.Conv(8, (3, 3), padding=1, **options)
  x = jnp.asarray(draw(2, 8, 8, 4), jnp.float32)
  params = layer.init(jax.random.key(0), x)
  with convolution.fast_in_loops("cpu"):
    out = layer.apply(params, x)
  np.testing.assert_array_equal(out, layer.apply(params, x))
