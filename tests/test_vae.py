"""The VAE beyond its plain forward pass: samples, shift, slices, tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live

from jaxpref.models import pipeline, vae


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
  return pipeline.load_pipeline(str(tiny_pipeline))


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.long
def test_mode_and_samples(loaded, images):
  module, params = loaded.modules["vae"], loaded.params["vae"]
  mean, logvar = vae.encode_moments(module, params, vae.to_unit(images))
  scale = module.scaling_factor
  np.testing.assert_allclose(vae.encode(module, params, images), mean * scale, rtol=1e-6)
  keys = jax.random.split(jax.random.key(1), 3)
  many = jax.vmap(lambda k: vae.encode(module, params, images[:1], k[None])[0])(
    jax.random.split(jax.random.key(0), 2000)
  )
  std = np.exp(0.5 * np.asarray(logvar[0])) * scale
  np.testing.assert_allclose(many.mean(0), mean[0] * scale, atol=5 * std.max() / 2000**0.5)
  np.testing.assert_allclose(many.std(0), std, rtol=0.1)
  # An image's sample is its own key's, whatever batch it is in.
  together = vae.encode(module, params, images, keys)
  alone = vae.encode(module, params, images[1:2], keys[1:2])
  np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_shift_and_scale_are_undone(loaded, images):
  config = {**loaded.configs["vae"], "shift_factor": 0.75, "scaling_factor": 0.5}
  shifted, params = vae.build_vae(config, dtype=jnp.float32), loaded.params["vae"]
  plain = vae.build_vae(
    {**config, "shift_factor": None, "scaling_factor": 1.0}, dtype=jnp.float32
  )
  latents = vae.encode(shifted, params, images)
  np.testing.assert_allclose(
    latents, (vae.encode(plain, params, images) - 0.75) * 0.5, atol=1e-6
  )
  np.testing.assert_array_equal(
    vae.decode(shifted, params, latents).pixels,
    vae.decode(plain, params, latents / 0.5 + 0.75).pixels,
  )


@pytest.mark.long
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_slices_are_the_whole(loaded, at_once):
  module, params = loaded.modules["vae"], loaded.params["vae"]
  latents = np.random.default_rng(1).standard_normal((4, *loaded.latent_shape), np.float32)
  whole = np.asarray(vae.decode(module, params, latents).pixels, int)
  sliced = jax.jit(lambda p, z: vae.decode_sliced(module, p, z, at_once=at_once))
  assert np.abs(np.asarray(sliced(params, latents).pixels, int) - whole).max() <= 1
  assert np.abs(np.diff(whole, axis=0)).max() > 1  # else their order would not be seen


def test_one_tile_is_the_whole(loaded):
  module, params = loaded.modules["vae"], loaded.params["vae"]
  for side in (6, 8):  # 8 is a tile
    latents = np.random.default_rng(2).standard_normal((1, 4, side, side), np.float32)
    whole = vae.decode(module, params, latents).pixels
    tiled = vae.decode_tiled(module, params, latents).pixels
    np.testing.assert_array_equal(tiled, whole)


@pytest.mark.long
@live
@pytest.mark.parametrize("shape", [(20, 13), (8, 8)])
def test_tiles_are_pytorchs(tiny_pipeline, loaded, shape):
  import torch
  from diffusers import AutoencoderKL

  model = AutoencoderKL.from_pretrained(tiny_pipeline / "vae").eval()
  model.enable_tiling()
  latents = np.random.default_rng(3).standard_normal((2, 4, *shape), np.float32)
  with torch.no_grad():
    theirs = model.decode(torch.tensor(latents)).sample
  module = dataclasses.replace(loaded.modules["vae"], scaling_factor=1.0)
  ours = vae.decode_tiled(module, loaded.params["vae"], latents).pixels
  want = np.asarray(vae.to_bytes(jnp.asarray(theirs.numpy())), int)
  factor = 2 ** (len(model.config.block_out_channels) - 1)
  assert ours.shape == (2, factor * shape[0], factor * shape[1], 3)
  assert np.abs(np.asarray(ours, int) - want).max() <= 1
