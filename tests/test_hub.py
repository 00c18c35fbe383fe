"""Pipelines by hub id: what is downloaded, what is said without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    env={k: v for k, v in os.environ.items() if not k.startswith("HF_")},
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
  assert "someone/never-seen is no directory" in offline and "cannot be asked" in offline
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
    "safety_checker/model.safetensors",
  ]
  found = hub.needed_files(files)
  assert found == [
    "model_index.json",
    "unet/config.json",
    f"{stem}.safetensors.index.json",
    *full,
    "vae/diffusion_pytorch_model.fp16.safetensors",
  ]
  assert set(half) < set(hub.needed_files(files, variant="fp16"))
  assert not set(full) & set(hub.needed_files(files, variant="fp16"))


def test_what_is_no_hub_id_is_a_directory(tmp_path):
  for name in (str(tmp_path / "nowhere"), "./a/b", "nowhere", "a/b/c"):
    with pytest.raises(UserError, match="model_index.json"):
      pipeline.load_pipeline(name)
