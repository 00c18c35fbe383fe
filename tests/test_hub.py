"""Pipelines by hub id: what is downloaded, what is said without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WITHOUT_TORCH

from jaxpref import base_config
from jaxpref import config as config_lib
from jaxpref.errors import UserError
from jaxpref.models import hub, pipeline

SCRIPT = Path(__file__).parent / "hub_main.py"
PARTS = ("unet", "vae", "text_encoder")


def test_a_download_takes_what_is_needed_and_works_offline_afterwards(tiny_pipeline, tmp_path):
  root = shutil.copytree(tiny_pipeline, tmp_path / "repo")
  for name in ("README.md", "v1.ckpt", "unet/diffusion_pytorch_model.bin", "big.safetensors"):
    (root / name).write_text("not needed")
  weights = root / "unet" / "diffusion_pytorch_model"
  shutil.copyfile(f"{weights}.safetensors", f"{weights}.fp16.safetensors")
  done = subprocess.run(
    [sys.executable, SCRIPT, root, tmp_path / "home"],
    env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | WITHOUT_TORCH,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = json.loads(done.stdout.splitlines()[-1])
  wanted = sorted(
    ["model_index.json", "scheduler/scheduler_config.json"]
    + [f"{part}/config.json" for part in PARTS]
    + [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    + ["text_encoder/model.safetensors"]
    + [f"tokenizer/{f}" for f in ("merges.txt", "tokenizer_config.json", "vocab.json")]
  )
  assert results["files"] == results["asked"] == wanted
  assert results["digest"] == pipeline.load_pipeline(str(tiny_pipeline)).digest
  assert results["offline"]
  assert "neither a directory nor a public repository" in results["unknown"]
  offline = results["offline, not cached"]
  assert "someone/never-seen is not a directory" in offline and "cannot be reached" in offline
  assert len(offline) < 250
  assert "the download of someone/a-model failed: " in results["broken"]
  assert "\n" not in offline + results["unknown"]


def test_needed_files_of_shards_and_variants():
  stem = "unet/diffusion_pytorch_model"
  full = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
  half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
  files = [
    *full,
    *half,
    f"{stem}.safetensors.index.json",
    f"{stem}.safetensors.index.fp16.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "unet/config.json",
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "safety_checker/model.safetensors",
    "vae/config.json",
  ]
  found = hub.needed_files(files, where="x")
  assert found == [
    "model_index.json",
    "unet/config.json",
    f"{stem}.safetensors.index.json",
    *full,
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
  ]
  # A part without the variant is read from its plain files; one part must have it.
  mixed = hub.needed_files(files, variant="fp16", where="x")
  assert set(half) < set(mixed) and "text_encoder/model.safetensors" in mixed
  with pytest.raises(UserError, match="x does not have weights of the variant ema"):
    plain = [f for f in files if "fp16" not in f]
    hub.needed_files(
      [*plain, "vae/diffusion_pytorch_model.safetensors"], variant="ema", where="x"
    )
  halved = hub.needed_files(
    [*files, "text_encoder/model.fp16.safetensors"], variant="fp16", where="x"
  )
  assert set(half) < set(halved) and not set(full) & set(halved)
  older = [f"{stem}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
  renamed = [older[half.index(f)] if f in half else f for f in files if f not in full]
  renamed.remove(f"{stem}.safetensors.index.json")
  assert set(older) < set(hub.needed_files(renamed, where="x"))


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (
      ["pytorch_lora_weights.safetensors"],
      "model_index.json is missing: it holds pytorch_lora_weights",
    ),
    (
      ["README.md"],
      "x is not a pipeline in diffusers' layout, because model_index.json is missing$",
    ),
    (["model_index.json"], "x: unet/config.json is missing"),
    (
      ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"],
      "x/unet/diffusion_pytorch_model.bin is pickled",
    ),
  ],
)
def test_repositories_that_are_no_pipeline_are_not_downloaded(files, message):
  with pytest.raises(UserError, match=message):
    hub.needed_files(files, where="x")


def test_what_is_no_hub_id_is_a_directory(tmp_path):
  for name in (str(tmp_path / "nowhere"), "./a/b", "nowhere", "a/b/c"):
    with pytest.raises(UserError, match="is neither a directory nor a Hub id"):
      pipeline.load_pipeline(name)
  with pytest.raises(UserError, match="is neither a directory nor a Hub id"):
    pipeline.load_pipeline("runs/my--run")
  with pytest.raises(UserError, match="this user has no home"):
    pipeline.load_pipeline("~nobody-here/x")
  (tmp_path / "pipeline").mkdir()
  with pytest.raises(UserError, match="not a complete pipeline"):
    pipeline.load_pipeline(str(tmp_path))
  (tmp_path / "pipeline" / "model_index.json").write_text("{}")
  with pytest.raises(UserError, match="is a pretraining run: its pipeline is .*/pipeline"):
    pipeline.load_pipeline(str(tmp_path))


@pytest.mark.parametrize("preset", base_config.PUBLISHED)
def test_planning_a_published_model_needs_no_network(preset, monkeypatch):
  def offline(*_, **__):
    raise AssertionError("the hub was asked")

  monkeypatch.setattr(hub.huggingface_hub, "HfApi", offline)
  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", offline)
  name = config_lib.load_config(f"dro:{preset}").model.path
  found = hub.find_pipeline(name, configs_only=True)
  assert found.name == preset
  described = pipeline.describe_pipeline(str(found))
  sizes = {"sd15": 512, "sdxl": 1024, "sd35m": 1024, "sana": 512, "flux": 1024}
  assert described.image_size == sizes[preset]
