"""Directories of weights: round trips, PyTorch as a witness, and what is refused."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live
from safetensors.numpy import load_file, save_file

from jaxpref import config as config_lib
from jaxpref.errors import UserError
from jaxpref.models import pipeline, save, text, torch_layout, unet, vae, weights
from jaxpref.pretrain import unet_base


@pytest.fixture(scope="module")
def loaded(tiny_pipeline):
  return pipeline.load_pipeline(str(tiny_pipeline))


def _close(ours, theirs):
  """Relative error of whole tensors at most 1e-4."""
  ours, theirs = np.asarray(ours), theirs.detach().numpy()
  assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@live
def test_unet_equals_pytorch(tiny_pipeline, loaded):
  import torch
  from diffusers import UNet2DConditionModel

  model = UNet2DConditionModel.from_pretrained(tiny_pipeline / "unet").eval()
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, *loaded.latent_shape)).astype(np.float32)
  cond = rng.standard_normal((2, 24, 16)).astype(np.float32)
  t = np.array([3, 981])
  denoise = jax.jit(unet.make_denoise(loaded.modules["unet"]))
  ours = denoise(loaded.params["unet"], x, t, {"text": cond})
  with torch.no_grad():
    theirs = model(torch.tensor(x), torch.tensor(t), torch.tensor(cond)).sample
  _close(ours, theirs)


@live
def test_text_encoder_equals_pytorch(tiny_pipeline, loaded):
  import torch
  from transformers import CLIPTextModel

  model = CLIPTextModel.from_pretrained(tiny_pipeline / "text_encoder").eval()
  (ids,) = text.tokenize(loaded.tokenizers, ["a red circle", "two stars above nothing"])
  ours = text.encode_text(loaded.modules["text_encoder"], loaded.params["text_encoder"], ids)
  with torch.no_grad():
    theirs = model(torch.tensor(ids, dtype=torch.long)).last_hidden_state
  _close(ours, theirs)


@live
def test_vae_equals_pytorch(tiny_pipeline, loaded):
  import torch
  from diffusers import AutoencoderKL

  model = AutoencoderKL.from_pretrained(tiny_pipeline / "vae").eval()
  images = np.random.default_rng(2).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
  module, params = loaded.modules["vae"], loaded.params["vae"]
  mean, logvar = vae.encode_moments(module, params, jnp.asarray(images))
  with torch.no_grad():
    posterior = model.encode(torch.tensor(images)).latent_dist
    decoded = model.decode(posterior.mean).sample
  _close(mean, posterior.mean)
  _close(logvar, posterior.logvar)
  ours = module.apply({"params": params}, mean, method=module.decode).sample
  _close(ours, decoded)


@live
def test_pytorch_diffusers_loads_the_whole_directory(tiny_pipeline):
  from diffusers import StableDiffusionPipeline

  whole, problems = StableDiffusionPipeline.from_pretrained(tiny_pipeline), []
  for part in ("unet", "vae", "text_encoder"):
    (file,) = (tiny_pipeline / part).glob("*.safetensors")
    stored = load_file(file)
    wanted = {k for k, _ in getattr(whole, part).named_parameters()}
    problems += sorted(wanted ^ stored.keys())
  assert not problems


def test_export_and_import_are_inverse(loaded, tmp_path):
  for part, module in loaded.modules.items():
    save_file(torch_layout.export_tensors(loaded.params[part], np.float32), tmp_path / part)
    tensors = weights.open_file(tmp_path / part)
    again, _ = torch_layout.import_tensors(
      tensors, pipeline.abstract_params(module), where=part
    )
    jax.tree.map(np.testing.assert_array_equal, again, dict(loaded.params[part]))


def test_tokenizer_cuts_pads_and_counts(loaded, caplog):
  ids, again = text.tokenize(loaded.tokenizers * 2, ["a ring", "ring " * 60, ""])
  np.testing.assert_array_equal(ids, again)
  assert ids.shape == (3, 16) and ids.dtype == np.int32
  start, end = loaded.tokenizers[0].bos_token_id, loaded.tokenizers[0].eos_token_id
  assert (ids[:, 0] == start).all() and (ids[:, -1] == end).all()
  assert (ids[2, 1:] == end).all()
  assert not caplog.records
  # Said once, and of distinct texts.
  text.warn_of_cut(loaded.tokenizers * 2, ["a ring", "ring " * 60, "", "ring " * 60])
  assert [r.getMessage() for r in caplog.records] == ["1 of 3 prompts cut to 16 tokens"]


def test_a_vocabulary_without_its_merges_is_refused(loaded, tmp_path):
  shutil.copytree(loaded.path / "tokenizer", tmp_path / "tokenizer")
  (tmp_path / "tokenizer" / "merges.txt").write_text("")
  with pytest.raises(UserError, match="its merges.txt is empty"):
    text.load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["KandinskyPipeline", "StableDiffusionInpaintPipeline", 7])
def test_other_pipelines_are_named(loaded, tmp_path, name):
  copy = shutil.copytree(loaded.path, tmp_path / "x")
  index = json.loads((copy / "model_index.json").read_text())
  (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
  with pytest.raises(UserError, match=f"model_index.json is of {name}, and jaxpref has only"):
    pipeline.load_pipeline(str(copy))


def test_slow_and_fast_tokenizers_agree(tiny_pipeline, tmp_path):
  from transformers import CLIPTokenizer, CLIPTokenizerFast

  texts = ["A Red  circle,", "l'été: 3 stars!", "naïve CAFÉ №5", "it's", "", "ring " * 40]
  slow = CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer")
  want = slow(texts, truncation=True, padding="max_length")["input_ids"]
  fast = text.load_tokenizer(tiny_pipeline / "tokenizer")
  np.testing.assert_array_equal(text.tokenize([fast], texts)[0], want)
  # And the newer form of one file, as `save_pretrained` of a fast tokenizer writes it.
  CLIPTokenizerFast.from_pretrained(tiny_pipeline / "tokenizer").save_pretrained(tmp_path)
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).unlink()
  again = text.load_tokenizer(tmp_path)
  np.testing.assert_array_equal(text.tokenize([again], texts)[0], want)


@pytest.fixture
def copy(tiny_pipeline, tmp_path):
  return shutil.copytree(tiny_pipeline, tmp_path / "pipeline")


def _refused(path, match):
  with pytest.raises(UserError, match=match) as error:
    pipeline.load_pipeline(str(path))
  assert "\n" not in str(error.value)


def test_missing_directory(tmp_path):
  _refused(tmp_path / "nowhere", "is neither a directory nor a Hub id")


def test_missing_weights(copy):
  (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
  _refused(copy, "vae/.* is missing")


def test_truncated_weights(copy):
  file = copy / "unet" / "diffusion_pytorch_model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])
  _refused(copy, "damaged or truncated")


def test_tensors_that_do_not_fit_are_all_listed(copy):
  file = copy / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  del tensors["conv_in.bias"]
  tensors["extra.weight"] = np.zeros(3, np.float32)
  tensors["conv_out.bias"] = np.zeros(7, np.float32)
  save_file(tensors, file)
  _refused(copy, r"missing conv_in.bias.*surplus extra.weight \(3,\).*conv_out.bias is \(7,\)")


def test_names_of_older_files_are_read(copy, loaded):
  # As diffusers wrote the VAE's attention until 0.13: Stable Diffusion 1.x's files.
  older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  file = copy / "vae" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(file)
  for name in [n for n in tensors if ".attentions." in n]:
    old = name
    for new_part, old_part in older.items():
      old = old.replace(f".{new_part}.", f".{old_part}.")
    tensors[old] = tensors.pop(name)
  assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
  save_file(tensors, file)
  read = pipeline.load_pipeline(str(copy)).params["vae"]
  for ours, theirs in zip(
    jax.tree.leaves(read), jax.tree.leaves(loaded.params["vae"]), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
  ("file", "content"), [("vocab.json", "{"), ("merges.txt", "#version: 0.2\nnot words\n")]
)
def test_damaged_tokenizer(copy, file, content):
  (copy / "tokenizer" / file).write_text(content)
  _refused(copy, "does not hold a CLIP tokenizer")


def test_tokenizer_of_another_model(copy):
  file = copy / "tokenizer" / "vocab.json"
  vocabulary = json.loads(file.read_text())
  vocabulary["extra</w>"] = len(vocabulary)
  file.write_text(json.dumps(vocabulary))
  _refused(copy, "do not belong together")


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    ("model_index.json", None, "does not hold a JSON object"),
    ("scheduler/scheduler_config.json", None, "does not hold a JSON object"),
    ("unet/config.json", {"block_out_channels": "abc"}, "does not describe a valid unet"),
    (
      "text_encoder/config.json",
      {"hidden_size": "wide"},
      "does not describe a valid text_encoder",
    ),
    ("unet/config.json", {"sample_size": [8, 16]}, "sample_size is .8, 16.: only equal values"),
    (
      "unet/config.json",
      {"layers_per_block": [1, 2]},
      "layers_per_block is .1, 2.: only equal",
    ),
    ("unet/config.json", {"num_attention_heads": [2, 4]}, "not support num_attention_heads"),
    ("unet/config.json", {"encoder_hid_dim_type": "text_proj"}, "support encoder_hid_dim_type"),
    ("vae/config.json", {"norm_num_groups": [8, 8]}, "norm_num_groups must be a whole"),
    (
      "vae/config.json",
      {"layers_per_block": 1.0},
      "layers_per_block must be a whole number .got 1.0",
    ),
    ("vae/config.json", {"layers_per_block": 10**30}, "layers_per_block must be at most 50"),
    (
      "unet/config.json",
      {"transformer_layers_per_block": [10**9, 1]},
      "must be at most 100 .got 1000000000",
    ),
    (
      "unet/config.json",
      {"block_out_channels": [32] * 10**5},
      "must have at most 100 values .got 100000",
    ),
    (
      "text_encoder/config.json",
      {"num_hidden_layers": 10**30},
      "num_hidden_layers must be at most",
    ),
    ("text_encoder/config.json", {"vocab_size": 10**30}, "vocab_size must be at most"),
    (
      "scheduler/scheduler_config.json",
      {"num_train_timesteps": 10**9},
      "num_train_timesteps must be at most 100000",
    ),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor must be positive .got None"),
    (
      "vae/config.json",
      {"scaling_factor": math.nan},
      "scaling_factor must be positive .got nan",
    ),
    ("vae/config.json", {"block_out_channels": []}, "does not describe a valid vae"),
    ("unet/config.json", {"attention_head_dim": 0}, "does not describe a valid unet"),
    (
      "unet/config.json",
      {"transformer_layers_per_block": "a"},
      "does not describe a valid unet",
    ),
    (
      "scheduler/scheduler_config.json",
      {"steps_offset": "1"},
      "config.json: steps_offset must",
    ),
    ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
    (
      "scheduler/scheduler_config.json",
      {"timestep_spacing": "x"},
      "timestep_spacing must be one of.*got 'x'",
    ),
    ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "config.json: beta_schedule"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "tokenizer"),
    ("tokenizer/tokenizer_config.json", {"pad_token": None}, "lacks pad_token"),
  ],
)
def test_configurations_of_another_kind(copy, file, fields, message):
  content = [] if fields is None else json.loads((copy / file).read_text()) | fields
  (copy / file).write_text(json.dumps(content))
  _refused(copy, message)


def test_parts_of_different_models(copy):
  settings = config_lib.load_config("shapes_base:tiny")
  settings.text.width = 24
  config = unet_base.denoiser_config(settings)
  other = pipeline.abstract_params(unet.build_unet(config, dtype=jnp.float32))
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), other)
  tensors = torch_layout.export_tensors(zeros, np.float32)
  save_file(tensors, copy / "unet" / "diffusion_pytorch_model.safetensors")
  (copy / "unet" / "config.json").write_text(json.dumps(config))
  _refused(copy, "takes texts of width 24 and latents of 4 channels")


def test_damaged_configuration(copy):
  (copy / "unet" / "config.json").write_text("[")
  _refused(copy, "cannot read .*unet")


def test_saving_replaces_a_directory_whole(tiny_pipeline, loaded, tmp_path):
  target = tmp_path / "out"
  target.mkdir()
  (target / "old").write_text("")
  configs = {
    part: json.loads((tiny_pipeline / part / "config.json").read_text())
    for part in loaded.params
  }
  configs["scheduler"] = json.loads(
    (tiny_pipeline / "scheduler" / "scheduler_config.json").read_text()
  )
  save.save_pipeline(target, loaded.params, configs=configs, tokenizers_from=tiny_pipeline)
  assert not (target / "old").exists()
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  halved = pipeline.load_pipeline(str(target)).params["unet"]["conv_in"]["kernel"]
  want = np.asarray(loaded.params["unet"]["conv_in"]["kernel"], np.float16)
  np.testing.assert_array_equal(halved, want)
