"""SD1.5, SD2.1 and SDXL, reduced: our outputs against PyTorch's, live and committed."""

import dataclasses
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live

from jaxpref import rng as rng_lib
from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.diffusion import guidance, sampler, timesteps
from jaxpref.models import pipeline, unet, vae

pytestmark = pytest.mark.long

GOLDEN = Path(__file__).parent / "golden" / "families.npz"
STEPS, GUIDANCE = 20, 5.0
SEEDS = np.array([11, 12], np.uint32)


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
  return request.param


@pytest.fixture(scope="module")
def directory(family, tmp_path_factory):
  return families.write_pipeline(family, tmp_path_factory.mktemp(family))


def noise_of(latent_shape):
  """What `make_generator` starts from, for SEEDS."""
  keys = jax.vmap(lambda s: rng_lib.key_of(0, "generate", s))(jnp.asarray(SEEDS))
  return np.asarray(sampler.initial_noise(keys, latent_shape))


def make_inputs(directory) -> dict[str, np.ndarray]:
  """Random inputs of every part."""
  loaded = pipeline.load_pipeline(str(directory))
  rng = np.random.default_rng(5)
  size, width = loaded.image_size, loaded.configs["unet"]["cross_attention_dim"]
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  inputs = {
    "image": rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32),
    "latent": draw(2, *loaded.latent_shape),
    "t": np.array([3, 981]),
    "text": draw(2, 77, width),
    "noise": noise_of(loaded.latent_shape),
  }
  if loaded.family.takes_sizes:
    inputs |= {
      "pooled": draw(2, families.WIDTHS[1]),
      "time_ids": rng.integers(0, 999, (2, 6)).astype("f"),
    }
  return inputs


def sampled(values: np.ndarray) -> np.ndarray:
  """About 64 of the values, evenly spaced over the flat array."""
  flat = np.asarray(values, np.float32).ravel()
  return flat[:: max(flat.size // 64, 1)]


@pytest.fixture(scope="module")
def ours(directory):
  """Our outputs under the names that `witness.outputs` gives PyTorch's."""
  loaded = pipeline.load_pipeline(str(directory))
  mesh = sharding.make_mesh()
  inputs = make_inputs(directory)
  module, params = loaded.modules["vae"], loaded.params["vae"]
  mean, logvar = vae.encode_moments(module, params, jnp.asarray(inputs["image"]))
  out = {"vae_mean": mean, "vae_logvar": logvar}
  decoded = module.apply({"params": params}, inputs["latent"], method=module.decode)
  out["vae_decoded"] = decoded.sample
  cond = encode.encode_prompts(loaded, mesh, families.PROMPTS)
  out |= {name: cond[name] for name in ("text", "pooled") if name in cond}
  denoise = unet.make_denoise(loaded.modules["unet"])
  given = {k: inputs[k] for k in ("text", "pooled", "time_ids") if k in inputs}
  weights = loaded.params["unet"]
  out["unet"] = jax.jit(denoise)(weights, inputs["latent"], inputs["t"], given)
  uncond = encode.encode_no_prompt(loaded, mesh)

  @jax.jit
  def latents(weights, noise, cond, uncond):
    levels = timesteps.uniform_grid(loaded.schedule, STEPS, len(noise), **loaded.spacing())
    guided = guidance.classifier_free(
      lambda x, t, c: denoise(weights, x, t, c), cond, uncond, GUIDANCE
    )
    return sampler.sample(guided, noise, levels, loaded.schedule)

  out["latents"] = latents(weights, inputs["noise"], cond, uncond)
  return {name: np.asarray(value) for name, value in out.items()}


def test_no_prompt_is_what_the_family_was_trained_with(family, directory):
  loaded = pipeline.load_pipeline(str(directory))
  mesh = sharding.make_mesh()
  none = encode.encode_no_prompt(loaded, mesh, size=(64, 32))
  empty = encode.encode_prompts(loaded, mesh, [""], size=(64, 32))
  assert none.keys() == empty.keys()
  # Training drops prompts to "", or to what guidance leads away from.
  dropped = encode.encode_dropped_prompt(loaded, mesh, "empty")
  np.testing.assert_array_equal(dropped["text"], empty["text"])
  dropped = encode.encode_dropped_prompt(loaded, mesh, "unconditional")
  np.testing.assert_array_equal(dropped["text"], none["text"])
  if family == "sdxl":
    assert not none["text"].any() and not none["pooled"].any()
    assert empty["text"].any() and empty["pooled"].any()
    np.testing.assert_array_equal(none["time_ids"], [[64, 32, 0, 0, 64, 32]])
    index = loaded.configs["model_index"] | {"force_zeros_for_empty_prompt": False}
    other = dataclasses.replace(loaded, configs={**loaded.configs, "model_index": index})
    unzeroed = encode.encode_no_prompt(other, mesh, size=(64, 32))
    np.testing.assert_array_equal(unzeroed["pooled"], empty["pooled"])
  else:
    np.testing.assert_array_equal(none["text"], empty["text"])


def _distance(a, b):
  return np.linalg.norm(np.float64(a) - b) / np.linalg.norm(np.float64(b))


def test_committed_numbers(family, ours):
  golden = np.load(GOLDEN)
  names = [name for name in golden.files if name.startswith(f"{family}/")]
  assert {n.partition("/")[2] for n in names} == ours.keys()
  far = {n: _distance(sampled(ours[n.partition("/")[2]]), golden[n]) for n in names}
  assert max(far.values()) < 1e-4, far


@live
def test_pytorch(directory, ours):
  import witness

  assert (witness.STEPS, witness.GUIDANCE) == (STEPS, GUIDANCE)
  theirs = witness.outputs(directory, make_inputs(directory), families.PROMPTS)
  assert theirs.keys() == ours.keys()
  far = {name: _distance(ours[name], value) for name, value in theirs.items()}
  assert max(far.values()) < 1e-4, far
