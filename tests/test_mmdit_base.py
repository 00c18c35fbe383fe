"""The shapes world's second base: layout, training, and the images of diffusers' pipeline."""

import json

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, live

from jaxpref import config as config_lib
from jaxpref import rng as rng_lib
from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.diffusion import flow, sampler
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import pipeline, save
from jaxpref.models.dit import embeddings, sd3_transformer
from jaxpref.pretrain import mmdit_base
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import checkpoint, checkpoint_files

CONFIG = "configs/shapes_mmdit.py"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A narrow base with random weights."""
  root = tmp_path_factory.mktemp("mmdit")
  config = config_lib.load_config("shapes_mmdit:tiny")
  prepared = pretrain.Prepared(config, None, mmdit_base, None, None, None)
  tokenizers = pretrain.write_tokenizers(prepared, root)
  configs = pretrain.pipeline_configs(config, vocab_size=len(tokenizers[0]))
  params = families.random_params(pipeline.build_modules(configs))
  save.save_pipeline(
    root / "base", params, configs=configs, tokenizers_from=root, dtype=np.float32
  )
  return root / "base"


def test_what_a_base_is(directory):
  made = pipeline.load_pipeline(str(directory))
  assert made.family is mmdit_base.FAMILY and made.encoders == list(mmdit_base.ENCODERS)
  assert made.latent_shape == (4, 8, 8) and made.image_size == 32
  assert made.schedule == flow.FlowSchedule()
  cond = {name: x.shape for name, x in made.abstract_cond(2).items()}
  assert cond == {"text": (2, 16, 192), "pooled": (2, 192)}  # without tokens of a T5
  found = encode.encode_prompts(made, sharding.make_mesh(), families.PROMPTS)
  assert {name: x.shape for name, x in found.items()} == cond
  index = json.loads((directory / "model_index.json").read_text())
  assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]


@pytest.mark.parametrize("tokens", [1, -1, 77, "256", None])
def test_other_numbers_of_t5s_tokens(tokens, directory):
  config = json.loads((directory / "transformer" / "config.json").read_text())
  with pytest.raises(UserError, match="_t5_tokens must be 0 or 256"):
    sd3_transformer.build_sd3_transformer(config | {"_t5_tokens": tokens}, dtype=jnp.float32)


def test_blocks_begin_as_the_identity():
  """Every layer but those that begin as zeros is random, and the velocity is 0."""
  config = config_lib.load_config("shapes_mmdit:tiny")
  network = sd3_transformer.build_sd3_transformer(
    mmdit_base.denoiser_config(config), dtype=jnp.float32
  )
  params = mmdit_base.begin_as_identity(network.init_weights(jax.random.key(0)))
  x, t, pooled = jnp.ones((1, 4, 8, 8)), jnp.ones(1), jnp.ones((1, 192))

  @jax.jit
  def apply(params):
    return network.apply({"params": params}, x, t, jnp.ones((1, 16, 192)), pooled)

  assert (apply(params) == 0).all()
  kernel = params["proj_out"]["kernel"]
  params["proj_out"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
  one = apply(params)
  block = params["transformer_blocks_1"]
  block["attn"] = jax.tree.map(lambda w: 2 * w, block["attn"])
  np.testing.assert_array_equal(apply(params), one)  # gates are closed
  block["norm1"]["linear"]["bias"] += 1.0
  assert jnp.abs(apply(params) - one).max() > 0.1


def test_the_corpus_is_encoded_once(tmp_path, monkeypatch):
  encoded = [3.0 * np.random.default_rng(0).standard_normal((5, 4, 2, 2), np.float32)]
  monkeypatch.setattr(pretrain.encode, "in_batches", lambda *_: encoded.pop())
  first, again = (
    pretrain.encode_corpus(None, None, None, None, tmp_path / "latents.npy") for _ in range(2)
  )
  assert not encoded and first[1] == again[1]
  np.testing.assert_array_equal(first[0], again[0])
  assert abs(first[0].std() - 1) < 1e-5


def _run(workdir, capsys, *extra, config=f"{CONFIG}:tiny"):
  arguments = [f"--config={config}", f"--workdir={workdir}", *extra]
  assert pretrain.main(arguments) == 0, capsys.readouterr().err
  return pipeline.load_pipeline(str(workdir / "pipeline"))


@pytest.mark.long
def test_trained_interrupted_and_continued(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  whole = _run(tmp_path / "whole", capsys)
  base = pipeline.load_pipeline("shapes")
  _assert_same(whole.params["vae"], base.params["vae"])
  network = whole.params["transformer"]
  assert np.abs(network["proj_out"]["kernel"]).max() > 0  # learned from zeros
  table = embeddings.position_table(32, 4, 4, 4).reshape(1, 16, 32)
  np.testing.assert_array_equal(network["pos_embed"]["pos_embed"], np.float16(table))
  # From zeros, no gradient reaches the text encoders in the first two updates.
  first = whole.params["text_encoder"]["text_model"]
  _assert_close(first, base.params["text_encoder"]["text_model"], 1e-3)
  card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
  assert "| MMDiT and text encoders | 2 updates of 4 images; a text encoder begins" in card
  assert f"--config={CONFIG}:tiny" in card and "predicts\nflow_prediction" in card
  save_state = checkpoint.Checkpointer.save

  def save_and_stop(*arguments):
    save_state(*arguments)
    raise KeyboardInterrupt

  # The number of updates may be changed before the learning rate falls.
  arguments = [f"--config={CONFIG}:tiny", f"--workdir={tmp_path / 'cut'}"]
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, "save", save_and_stop)
    assert pretrain.main([*arguments, "--config.denoiser.num_updates=9"]) == 130
  assert checkpoint_files.steps(tmp_path / "cut" / "denoiser" / "checkpoints") == [1]
  _assert_same(_run(tmp_path / "cut", capsys).params, whole.params)
  # Trained on from there, with its own tokenizer.
  _run(tmp_path / "more", capsys, f"--config.denoiser.path={tmp_path / 'cut' / 'pipeline'}")
  card = (tmp_path / "more" / "pipeline" / "README.md").read_text()
  assert "### 2" in card and "trained on for 2 updates of 4 images |" in card
  # A text encoder of another width is refused before anything is written.
  arguments = [f"--config={CONFIG}:tiny", "--config.text.widths=(64, 64)"]
  assert pretrain.main([*arguments, f"--workdir={tmp_path / 'other'}"]) == 2
  assert "text.path: the text_encoder of 'shapes' has other shapes" in capsys.readouterr().err
  assert not (tmp_path / "other").exists()


def _assert_close(ours, theirs, error):
  """Weight decay moves each weight by far less than its size."""
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  assert all(np.allclose(a, b, rtol=error, atol=1e-6) for a, b in pairs)


def _assert_same(ours, theirs):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  assert all(np.array_equal(a, b) for a, b in pairs)


@live
@pytest.mark.long
def test_diffusers_pipeline_makes_the_same_images(directory):
  """20 guided steps of Euler; `max_sequence_length=0` leaves out T5's tokens in diffusers."""
  check_images(directory)


def check_images(path):
  """Compares images with those of diffusers' pipeline, from the same noise."""
  import torch
  from diffusers import StableDiffusion3Pipeline

  theirs = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
  theirs.set_progress_bar_config(disable=True)
  ours, mesh = pipeline.load_pipeline(str(path)), sharding.make_mesh()
  prompts, seeds = ["a red circle", "two blue squares"], np.array([11, 12], np.uint32)
  cond = encode.encode_prompts(ours, mesh, prompts)
  keys = jax.vmap(lambda s: rng_lib.key_of(0, "generate", s))(jnp.asarray(seeds))
  noise = np.array(sampler.initial_noise(keys, ours.latent_shape))
  want = theirs(
    prompts,
    latents=torch.tensor(noise),
    height=32,
    width=32,
    num_inference_steps=20,
    guidance_scale=2.0,
    max_sequence_length=0,
    output_type="np",
  ).images
  generate = sampling.make_generator(
    ours, mesh, num_steps=20, guidance=2.0, batch_size=2, order=1
  )
  images = generate(ours.denoiser_params, cond, seeds)
  assert images.std() > 20
  assert np.abs(images - 255.0 * want).max() < 1.0  # theirs are not rounded
