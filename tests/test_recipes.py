"""Choices in which published recipes differ: whose errors the reference's are, and latents."""

import functools
import importlib
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import ROOT, live

from jaxpref import base_config, config, losses, main, sharding
from jaxpref.data import encode, row_set
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.models import pipeline, vae
from jaxpref.training import batch as batch_lib


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


ONE = {"train.num_updates": 1, "evaluate.num_prompts": 1}


@pytest.fixture(scope="module")
def tuned_model(tiny_pipeline, tmp_path_factory, tfds_dir):
  """Workdirs of SFT, of all parameters and of additions, by rank."""
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    for rank in (0, 2):
      found[rank] = tmp_path_factory.mktemp("sft") / "run"
      fields = {**ONE, "train.num_updates": 3, "optim.lr": 0.01, "lora.rank": rank}
      assert main.main(runs.arguments(tiny_pipeline, found[rank], "sft", **fields)) == 0
  return found


CASES = [
  # method, further fields, whose errors the reference's are
  ("dpo", {}, "start"),
  ("dpo", {"loss.reference": "base"}, "base"),
  ("dpo", {"lora.rank": 2}, "start"),
  ("dpo", {"data.noise_draws": 2}, "start"),
  ("kto", {}, "start"),
]


@pytest.mark.long
@pytest.mark.parametrize(("method", "fields", "reference"), CASES)
def test_whose_errors_the_reference_has(
  method, fields, reference, tiny_pipeline, tuned_model, tmp_path
):
  """SFT first, then DPO: the first loss is ln 2 where the reference is the SFT model."""
  workdir = tmp_path / "run"
  fields = {**ONE, "model.start": tuned_model[fields.get("lora.rank", 0)], **fields}
  assert main.main(runs.arguments(tiny_pipeline, workdir, method, **fields)) == 0
  (line,) = runs.lines(workdir)
  arm = "x" if method == "kto" else "w"
  apart = abs(line[f"err/policy_{arm}"] - line[f"err/reference_{arm}"])
  assert (apart < 1e-6) == (reference == "start")
  if method == "dpo":
    assert (abs(line["loss"] - math.log(2)) < 1e-3) == (reference == "start")
  (start,) = json.loads((workdir / "starts.json").read_text())
  assert start["reference"] == reference
  assert str(tuned_model[0] if reference == "start" else tiny_pipeline) in (
    workdir / "report.html"
  ).read_text() or fields.get("lora.rank")


def test_iterative_dpo_keeps_the_base_and_spin_the_iterate_before():
  defaults = {
    name: importlib.import_module(f"configs.{name}").get_config("tiny").loss.reference
    for name in ("dpo", "kto", "dro", "spin", "iterative_dpo")
  }
  assert defaults.pop("iterative_dpo") == "base"
  assert set(defaults.values()) == {"start"}


def test_a_loss_without_a_reference_refuses_the_choice(tiny_pipeline, tmp_path, capsys):
  fields = {"loss.reference": "base"}
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "run", "sft", **fields)) == 2
  assert "loss.reference = 'base', but sft has no reference" in capsys.readouterr().err


def test_latents_are_sampled_from_their_posteriors():
  """Anew at each update, the same again for the same one; a fixed draw keeps its own."""
  rows = 4
  mode = np.arange(rows * 2 * 4 * 16 * 16, dtype=np.float32).reshape(rows, 2, 4, 16, 16) / 1e4
  std = np.full_like(mode, 0.3)
  std[1] = 0.0
  batch = {"latents": mode, "std": std}
  first, again, later = (np.asarray(batch_lib._clean(batch, 5, u)) for u in (7, 7, 8))
  np.testing.assert_array_equal(first, again)
  assert (first != later).any(axis=(1, 2, 3, 4)).tolist() == [True, False, True, True]
  eps = ((first - mode) / 0.3)[[0, 2, 3]]
  assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
  assert abs(np.corrcoef(eps[:, 0].ravel(), eps[:, 1].ravel())[0, 1]) < 0.05  # arm by arm
  fixed = [
    np.asarray(
      batch_lib._clean(batch | {"row": np.arange(rows), "draw": np.full(rows, d)}, 5, u)
    )
    for d, u in ((0, 1), (0, 2), (1, 2))
  ]
  np.testing.assert_array_equal(fixed[0], fixed[1])
  assert (fixed[1] != fixed[2]).any()
  shuffled = {name: x[::-1] for name, x in batch.items()}
  shuffled |= {"row": np.arange(rows)[::-1], "draw": np.zeros(rows, int)}
  np.testing.assert_array_equal(batch_lib._clean(shuffled, 5, 3)[::-1], fixed[0])
  np.testing.assert_array_equal(batch_lib._clean({"latents": mode}, 5, 7), mode)


def test_what_an_improver_is_shown_is_not_sampled():
  improver = losses.load_loss("improver")
  weights = dict.fromkeys(("weight_winning", "weight_reconstruction"), 1.0)
  arrange = functools.partial(improver.arrange, **weights | {"weight_unconditional": 0.0})
  mode = np.random.default_rng(0).normal(size=(8, 2, 4, 8, 8)).astype(np.float32)
  cond = {"text": np.zeros((8, 3, 5), np.float32)}
  empty = {"text": np.ones((1, 3, 5), np.float32)}
  arms = [
    batch_lib.make_arms(
      *(schedule_lib.make_schedule(), improver.NEEDS, {"cond": cond, "latents": mode, **more}),
      *(None, empty),
      seed=0,
      update=3,
      prompt_dropout=0.0,
      arrange=arrange,
    )
    for more in ({}, {"std": np.full_like(mode, 0.5)})
  ]
  np.testing.assert_array_equal(arms[0].cond["image"], arms[1].cond["image"])
  np.testing.assert_array_equal(arms[0].labels["task"], arms[1].labels["task"])
  assert (np.asarray(arms[0].x_t) != np.asarray(arms[1].x_t)).all()


@live
def test_posteriors_are_those_of_diffusers(tiny_pipeline):
  """Both ways round, of images and their mirror images."""
  import torch
  from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

  loaded = pipeline.load_pipeline(str(tiny_pipeline))
  size = loaded.image_size
  images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
  row = [row_set.Row((image,), "a ring") for image in images]
  got = encode.encode_rows(
    *(loaded, sharding.make_mesh(), row_set.collect(row)), flip=True, latents="sample"
  )
  both = np.concatenate([images, images[:, :, ::-1]])
  module, params = loaded.modules["vae"], loaded.params["vae"]
  mean, logvar = vae.encode_moments(module, params, vae.to_unit(jnp.asarray(both)))
  moments = torch.tensor(np.concatenate([mean, logvar], axis=1))
  theirs = DiagonalGaussianDistribution(moments)
  scale = module.scaling_factor
  for name, want in (("latents", theirs.mode()), ("std", theirs.std)):
    np.testing.assert_allclose(
      np.asarray(got[name])[:, 0], want.numpy() * scale, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("preset", base_config.PRESETS)
def test_presets_prepare_images_as_their_references_do(preset):
  found = importlib.import_module("configs.dpo").get_config(preset)
  config.validate(found)
  sampled = set(base_config.PUBLISHED) - {"sana"}  # SANA's VAE has no posterior
  assert found.data.latents == ("sample" if preset in sampled else "mode")
  assert found.data.dropped_prompt == "empty"
  spin = importlib.import_module("configs.spin").get_config(preset)
  assert (spin.optim.schedule == "linear") == (preset in base_config.PUBLISHED)
