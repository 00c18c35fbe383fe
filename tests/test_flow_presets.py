"""Presets of flow-matching models: their values, and runs on such models of reduced width."""

import families
import flow_networks
import jax
import numpy as np
import pytest
import runs
import sana_models
from PIL import Image

from jaxpref import base_config, export
from jaxpref import config as config_lib
from jaxpref.errors import UserError
from jaxpref.models import pipeline
from jaxpref.plan import estimate
from jaxpref.training import load_run

# Methods whose beta multiplies differences of errors, as Flow-DPO's.
LIKE_DPO = ("dpo", "iterative_dpo", "kto", "listwise", "online_dpo", "sdpo", "simpo", "spin")


def test_the_published_recipe_of_sd35():
  config = config_lib.load_config("dpo:sd35m")
  assert (config.lora.rank, config.lora.alpha) == (32, 64.0)
  optim = config.optim
  found = (optim.lr, optim.weight_decay, optim.clip_norm, optim.warmup_updates)
  assert found == (3e-4, 1e-4, 1.0, 0)
  noise = config.noise
  assert (noise.density, noise.mean, noise.std) == ("logit_normal", 0.0, 1.0)
  assert (noise.shift, config.loss.space) == (0.0, "v")
  assert config.model.image_size == 512
  assert (config.evaluate.num_steps, config.evaluate.guidance) == (40, 4.5)
  assert config.model.dtype == config.model.frozen_dtype == "bfloat16"
  assert optim.ema_decay**8 == pytest.approx(0.9, abs=1e-3)


def test_sana_trains_all_parameters_with_its_pipelines_sampler():
  config = config_lib.load_config("dpo:sana")
  assert config.lora.rank == 0 and config.data.latents == "mode"
  assert (config.evaluate.num_steps, config.evaluate.guidance) == (20, 4.5)


def test_flux_is_told_guidance_with_its_pipelines_sampler():
  config = config_lib.load_config("dpo:flux")
  assert (config.evaluate.num_steps, config.evaluate.guidance) == (28, 3.5)
  assert config.model.guidance == config.rollout.guidance == 1.0
  assert (config.lora.rank, config.model.frozen_dtype) == (32, "bfloat16")
  for method in (
    "awm",
    "best_of",
    "d3po",
    "dgpo",
    "nft",
    "online_dpo",
    "ppo",
    "prdp",
    "rwr",
    "spo",
  ):
    config = config_lib.load_config(f"{method}:flux")
    assert config.model.guidance == config.rollout.guidance == 3.5
  for method in ("dgpo", "ppo"):
    assert config_lib.load_config(f"{method}:sd35m").rollout.guidance == 4.5


@pytest.mark.parametrize("preset", base_config.FLOWS)
def test_strengths_are_those_of_velocities(preset):
  assert {config_lib.load_config(f"{n}:{preset}").loss.beta for n in LIKE_DPO} == {100.0}
  dro = config_lib.load_config(f"dro:{preset}")
  assert (dro.loss.space, dro.loss.margin, dro.noise.density) == ("eps", 1e-3, "uniform")
  assert config_lib.load_config(f"iterative_dpo:{preset}").iterate.winners == "data"


@pytest.mark.long
@pytest.mark.parametrize(
  ("preset", "parameters", "layers", "width"),
  [
    ("sd35m", 2_243_171_520 + 384**2 * 1536, 191, 1536),  # with the table of positions
    # The eight projections of 19 blocks of two streams, and three of 38 blocks of one.
    ("flux", 11_901_408_320, 19 * 8 + 38 * 3, 3072),
  ],
)
def test_a_plan_counts_the_published_model(preset, parameters, layers, width):
  """PyTorch's count; the layers have additions of rank 32."""
  numbers = estimate.plan(config_lib.load_config(f"dpo:{preset}"), "h200:1", search=False)
  assert numbers["parameters"] == parameters
  assert numbers["trained"] == layers * 32 * 2 * width


@pytest.mark.parametrize(("preset", "unit"), [("sd35m", 16), ("sana", 32)])
def test_the_size_of_images_is_chosen(preset, unit):
  model = config_lib.load_config(f"dpo:{preset}").model.path
  native, chosen = (pipeline.describe_pipeline(model, image_size=n) for n in (0, 256))
  assert native.image_size == {"sd35m": 1024, "sana": 512}[preset]
  channels, *size = chosen.latent_shape
  assert channels == native.latent_shape[0]
  assert size == [256 // chosen.vae_factor] * 2 and chosen.image_size == 256
  with pytest.raises(UserError, match=f"must be a multiple of {unit} .* .got 264"):
    pipeline.describe_pipeline(model, image_size=264)


def _write(preset, directory):
  if preset == "sana":
    return sana_models.write_sana(directory)
  return flow_networks.write_sd3(directory, t5=False)


def _fields(directory):
  """Overrides that make a run small; the images are written to `directory`."""
  directory.mkdir()
  rng = np.random.default_rng(0)
  for i in range(4):
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(directory / f"{i}.png")
    (directory / f"{i}.txt").write_text(families.PROMPTS[i % 2])
  return {
    "data.source": "folder",
    "data.path": directory,
    "data.num_experts": 0,
    "rollout.num_steps": 2,
    "rollout.batch_size": 2,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.updates_per_iteration": 1,
    "train.log_every": 1,
    "evaluate.num_prompts": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_steps": 2,
    "evaluate.batch_size": 2,
  }


@pytest.mark.long
@pytest.mark.parametrize("preset", ["sd35m", "sana"])  # Flux: see test_flux_family
def test_dro_trains_resumes_evaluates_and_exports(preset, tmp_path):
  base = _write(preset, tmp_path / "model")
  settings = {"updates": (1, 2), "preset": preset, **_fields(tmp_path / "images")}
  size = settings["model.image_size"] = {"sd35m": 24, "sana": 64}[preset]
  whole, parts = runs.check_resumed(base, tmp_path, "dro", **settings)
  for workdir in (whole, parts):
    losses = [line["loss"] for line in runs.lines(workdir) if "loss" in line]
    assert len(losses) == 2 and losses[0] > 0 and np.isfinite(losses).all()
    assert (workdir / "report.html").is_file() and (workdir / "evaluation/2/grid.png").is_file()
  out = tmp_path / "tuned"
  assert export.main([f"--workdir={parts}", f"--out={out}", "--dtype=float32"]) == 0
  found, start = (pipeline.load_pipeline(str(path)).denoiser_params for path in (out, base))
  loaded = load_run.load(str(parts))
  tuned = loaded.denoiser_params
  assert loaded.image_size == size
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), found, start)
  assert any(jax.tree.leaves(changed))
  if preset == "sd35m":
    assert not changed["pos_embed"]["pos_embed"]
  if preset in base_config.LORA_FLOWS:
    lora = tmp_path / "lora.safetensors"
    assert export.main([f"--workdir={parts}", f"--out={lora}", "--lora"]) == 0
    assert lora.is_file()
  else:
    jax.tree.map(np.testing.assert_array_equal, found, tuned)
