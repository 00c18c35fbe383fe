"""SANA's autoencoder: numbers and names of PyTorch's diffusers, and what `vae` does with it."""

import functools
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sana_models

from jaxpref.errors import UserError
from jaxpref.models import dc_ae, dc_ae_blocks, torch_layout, vae
from jaxpref.models.dit import sana_blocks
from jaxpref.training import flops

GOLDEN = Path(__file__).parent / "golden"
# TFLOP of encoding and decoding an image, as PyTorch counts it.
FLOPS = {512: (1.30, 2.09), 1024: (5.18, 8.37)}


@functools.cache
def _load():
  module = dc_ae.build_dc_ae(sana_models.DC_AE, dtype=jnp.float32)
  shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
  return module, sana_models.random_params(shapes)


def _error(way, size, params=None):
  """The largest error of encoding or decoding, by the largest number."""
  module, own = _load()
  given = {"encoded": sana_models.image, "decoded": sana_models.latent}[way](size)
  methods = {"encoded": lambda m, x: m.moments(x)[0], "decoded": lambda m, x: m.pixels(x)}
  run = jax.jit(lambda p, x: module.apply({"params": p}, x, method=methods[way]))
  out, want = run(params or own, given), np.load(GOLDEN / "sana.npz")[f"{way}/{size}"]
  assert out.shape == want.shape
  return float(np.abs(out - want).max() / np.abs(want).max())


@pytest.mark.parametrize(
  ("way", "size"),
  [
    pytest.param("encoded", "wide", marks=pytest.mark.long),
    ("encoded", "small"),
    ("decoded", "wide"),
    pytest.param("decoded", "small", marks=pytest.mark.long),
  ],
)
def test_numbers_are_pytorchs(way, size):
  assert _error(way, size) < 1e-5


def _cut_in_thirds(query, key, value):
  """The attention if q, k and v were the thirds of the channels."""
  joined = jnp.concatenate([query, key, value], axis=-1)
  b, n, heads, wide = joined.shape
  thirds = jnp.split(joined.reshape(b, n, -1), 3, axis=-1)
  return sana_blocks.relu_linear_attention(*(x.reshape(b, n, heads, wide // 3) for x in thirds))


def _pixels_first(x):
  """Channels into pixels, if the pixel came before the channel."""
  b, h, w, c = x.shape
  tiles = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
  return tiles.reshape(b, 2 * h, 2 * w, c // 4)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["heads", "order", "pixels"])
def test_a_fault_would_be_seen(fault, monkeypatch):
  _, params = _load()
  if fault == "heads":
    monkeypatch.setattr(dc_ae_blocks, "relu_linear_attention", _cut_in_thirds)
  elif fault == "order":  # the two blocks of the smallest feature maps
    decoder = dict(params["decoder"])
    last = decoder["up_blocks_2"]
    decoder["up_blocks_2"] = {"0": last["1"], "1": last["0"]}
    params = {**params, "decoder": decoder}
  else:
    monkeypatch.setattr(dc_ae_blocks, "shuffle", _pixels_first)
  assert _error("decoded", "small", params) > 1e-2


def test_shuffle_is_undone():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  small = dc_ae_blocks.unshuffle(jnp.asarray(x))
  # PyTorch's order: the channel, then the pixel's row, then its column.
  np.testing.assert_array_equal(
    small[0, 1, 2, 4:8], [x[0, i, j, 1] for i in (2, 3) for j in (4, 5)]
  )
  np.testing.assert_array_equal(dc_ae_blocks.shuffle(small), x)


@pytest.mark.long
def test_a_latent_is_its_own_mode_and_sample():
  module, params = _load()
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
  keys = jax.random.split(jax.random.key(0), 2)

  @jax.jit
  def run(params):
    mode, std = vae.encode_posterior(module, params, images)
    latent, _ = vae.encode_moments(module, params, vae.to_unit(images))
    encode = functools.partial(vae.encode, module, params, images)
    return std, latent, mode, encode(), encode(keys)

  std, latent, *same = run(params)
  assert (np.asarray(std) == 0).all()
  for array in same:
    np.testing.assert_array_equal(array, same[0])
  np.testing.assert_allclose(same[0], latent * 0.41407, rtol=1e-6)


@pytest.mark.long
def test_scaled_latents_are_decoded():
  module, params = _load()
  golden = np.load(GOLDEN / "sana.npz")["decoded/small"]
  scaled = sana_models.latent("small") * 0.41407
  decoded = vae.decode(module, params, scaled)
  assert decoded.finite.all()
  want = np.asarray(vae.to_bytes(jnp.asarray(golden)), int)
  assert np.abs(np.asarray(decoded.pixels, int) - want).max() <= 1
  tiled = vae.decode_tiled(module, params, scaled)
  np.testing.assert_array_equal(tiled.pixels, decoded.pixels)


@pytest.mark.long
def test_every_tensor_has_its_place():
  module = dc_ae.build_dc_ae(sana_models.PUBLISHED["dc-ae"], dtype=jnp.float32)
  shapes = jax.eval_shape(module.init_weights, jax.random.key(0))
  lines = (GOLDEN / "layouts" / "sana.txt").read_text().splitlines()
  layout = {
    name: tuple(map(int, shape))
    for model, name, *shape in map(str.split, lines)
    if model == "dc-ae"
  }
  torch_layout.check_tensors(layout, shapes, where="DC-AE")
  written = {
    torch_layout.torch_name(path): torch_layout.torch_shape(path, leaf.shape)
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items()
  }
  assert written == layout and len(layout) == 375
  assert sum(int(np.prod(shape)) for shape in layout.values()) == 312_250_275
  zeros = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  for side, want in FLOPS.items():
    inputs = zeros((1, 3, side, side)), zeros((1, 32, side // 32, side // 32))
    for method, x, tera in zip(("moments", "pixels"), inputs, want, strict=True):
      program = jax.make_jaxpr(lambda p, x, m=method: module.apply({"params": p}, x, method=m))
      assert flops.count(program(shapes, x)) == pytest.approx(tera * 1e12, rel=0.02)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("encoder_block_types", ["ResBlock", "Foo", "ResBlock"], "encoder_block_types: 'Foo'"),
    (
      "decoder_layers_per_block",
      [1, 1],
      "decoder_layers_per_block must be a list of the length",
    ),
    ("encoder_layers_per_block", [0, 1, 1], "positive whole numbers"),
    ("decoder_qkv_multiscales", [[], [4], []], "lists of odd sizes"),
    ("encoder_block_out_channels", [16, 16, 36], "cannot divide 4 x 16 by 36"),
    ("latent_channels", 5, "cannot divide 32 by latent_channels 5"),
    ("attention_head_dim", 7, "cannot divide 16 by attention_head_dim 7"),
    ("decoder_norm_types", ["rms_norm", "batch_norm", "rms_norm"], "decoder_norm_types = "),
    ("upsample_block_type", "pixel_shuffle", "upsample_block_type = 'pixel_shuffle'"),
  ],
)
def test_other_autoencoders_are_refused(field, value, message):
  with pytest.raises(UserError, match=message):
    dc_ae.build_dc_ae({**sana_models.DC_AE, field: value}, dtype=jnp.float32)


def test_fields_that_are_not_said_are_diffusers():
  said = ("attention_head_dim", "scaling_factor", "latent_channels")
  config = {k: v for k, v in sana_models.PUBLISHED["dc-ae"].items() if k not in said}
  assert dc_ae.build_dc_ae(config, dtype=jnp.float32).scaling_factor == 1.0
  del config["downsample_block_type"]
  with pytest.raises(UserError, match="downsample_block_type = 'pixel_unshuffle'"):
    dc_ae.build_dc_ae(config, dtype=jnp.float32)
