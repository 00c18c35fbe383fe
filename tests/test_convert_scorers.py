"""Conversion of published weights, and LAION's own files."""

import collections
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scorer_models
from conftest import live
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxpref import scorers
from jaxpref.models import blip, clip_towers, save
from jaxpref.scorers import aesthetic, convert
from jaxpref.scorers.base import Published, aesthetic_scores, store

GOLDEN = Path(__file__).parent / "golden" / "scorers"
# A directory with the two files as LAION's authors publish them.
LAION = os.environ.get("JAXPREF_LAION", "")
as_published = pytest.mark.skipif(not LAION, reason="JAXPREF_LAION does not name LAION's files")


@pytest.fixture
def root(tmp_path, monkeypatch):
  monkeypatch.setenv(store.ROOT, str(tmp_path / "store"))
  return tmp_path / "store"


@pytest.fixture(scope="module")
def golden():
  return json.loads((GOLDEN / "scores.json").read_text())["scores"]


@pytest.fixture
def narrow(monkeypatch, tmp_path):
  """Makes the published sizes those of `scorer_models`; returns open_clip's tensors."""
  words = scorer_models.write_tokenizer(tmp_path / "words")
  monkeypatch.setattr(clip_towers, "H14", scorer_models.open_clip_config(words))
  return scorer_models.open_clip_tensors(words, 7)


def run(capsys, *argv) -> tuple[int, str]:
  status = convert.main([str(word) for word in argv])
  out, err = capsys.readouterr()
  return status, out + err


def score(name: str) -> np.ndarray:
  return scorers.load_scorers([name])[name][1](
    scorer_models.photographs(), scorer_models.PROMPTS
  )


@live
def test_hpsv2_from_its_pickle(root, narrow, tmp_path, capsys, golden):
  import torch

  file = tmp_path / "HPS_v2.1_compressed.pt"
  state = collections.OrderedDict((n, torch.tensor(a)) for n, a in narrow.items())
  torch.save({"state_dict": state}, file)
  status, text = run(capsys, "hpsv2.v2_1", file)
  written = root / "hpsv2.v2_1" / "model.safetensors"
  assert status == 0 and str(written) in text
  with safe_open(written, "numpy") as stored:
    about = stored.metadata()
  assert about["scorer"] == "hpsv2.v2_1" and about["source"] == file.name
  assert about["sha256"] in text and len(about["sha256"]) == 64
  scorer_models.write_tokenizer(root / "clip.l14")
  np.testing.assert_allclose(score("hpsv2.v2_1"), golden["open_clip"], rtol=1e-5, atol=1e-4)
  status, text = run(capsys, "hpsv2.v2_1", file)
  assert status == 2 and "exists: choose another --out, or delete it" in text


def test_open_clips_safetensors_need_no_torch(root, narrow, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  file = tmp_path / "open_clip_model.safetensors"
  save.save_tensors(file, narrow)
  assert run(capsys, "clip.h14", file, "--out", tmp_path / "there")[0] == 0
  found = load_file(tmp_path / "there" / "model.safetensors")
  np.testing.assert_array_equal(found["text_projection.weight"], narrow["text_projection"].T)
  config = json.loads((tmp_path / "there" / "config.json").read_text())
  assert config == clip_towers.H14
  narrow.pop("visual.ln_post.bias")
  save.save_tensors(file, narrow)
  status, text = run(capsys, "pickscore.v1", file)
  assert status == 2 and "missing vision_model.post_layernorm.bias" in text
  assert not (root / "pickscore.v1" / "model.safetensors").exists()
  status, text = run(capsys, "hpsv2.v2_1", Path(__file__))
  assert status == 2 and "reading it needs PyTorch" in text


@live
def test_image_reward_from_its_pickle(root, tmp_path, capsys, monkeypatch, golden):
  import torch

  directory = tmp_path / "imagereward.v1"
  scorer_models.write_image_reward(directory, 13)
  config = json.loads((directory / "config.json").read_text())
  monkeypatch.setattr(blip, "IMAGE_REWARD", config)
  tensors = {n: torch.tensor(a) for n, a in load_file(directory / "model.safetensors").items()}
  unused = {"blip.text_proj.bias": torch.ones(3), "blip.vision_proj.weight": torch.ones(3, 3)}
  buffer = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
  torch.save({**tensors, **unused, **buffer}, tmp_path / "ImageReward.pt")
  assert run(capsys, "imagereward.v1", tmp_path / "ImageReward.pt")[0] == 0
  (directory / "vocab.txt").rename(root / "imagereward.v1" / "vocab.txt")
  want = np.array(golden["imagereward.v1"])
  # Processors round differently: relative to the largest score, as in test_scorers.
  np.testing.assert_allclose(score("imagereward.v1"), want, atol=1e-5 * np.abs(want).max())


@live
def test_pickles_that_are_not_tensors_are_refused(root, narrow, tmp_path, capsys):
  import torch

  class Program:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path}/ran",)

  file = tmp_path / "HPS_v2_compressed.pt"
  torch.save({"state_dict": {"a": Program()}}, file)
  status, text = run(capsys, "hpsv2.v2_0", file)
  assert status == 2 and "holds objects that could run programs" in text
  assert not (tmp_path / "ran").exists()
  for odd in ([1, 2], {"a": 1}, torch.ones(3)):
    torch.save(odd, file)
    status, text = run(capsys, "hpsv2.v2_0", file)
    assert status == 2 and "does not hold a dictionary of tensors" in text, odd
  file.write_bytes(b"not a pickle")
  status, text = run(capsys, "hpsv2.v2_0", file)
  assert status == 2 and "cannot be read as tensors only" in text


def test_a_file_of_another_sum_is_refused(root, tmp_path, capsys):
  file = tmp_path / "ava+logos-l14-linearMSE.pth"
  file.write_bytes(b"other weights by the same names")
  status, text = run(capsys, "aesthetic.v2", file)
  assert status == 2 and f"is not {aesthetic.V2.file}" in text
  assert text.count("\n") == 1 and aesthetic.V2.sha256 in text
  status, text = run(capsys, "aesthetic.v3", file)
  assert status == 2 and "known are clip.h14, clip.l14" in text
  status, text = run(capsys, "aesthetic.v1", tmp_path)
  assert status == 2 and "is missing or not a file" in text


def features() -> np.ndarray:
  """Random directions, float64 [8, 768] of length 1."""
  found = np.random.default_rng(0).standard_normal((8, 768))
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def read_head(directory: Path, name: str):
  abstract = aesthetic_scores.abstract_head(name, 768)
  return store.read_params(directory, abstract, ignored=lambda name: False)


def test_laions_first_head(tmp_path, capsys, root):
  """The published weights (MIT licence), converted."""
  name = "aesthetic.v1"
  stored = load_file(GOLDEN / "laion_v1.safetensors")
  assert run(capsys, name, GOLDEN / "laion_v1.safetensors")[0] == 0
  weight, bias = (stored[k].astype(np.float64) for k in ("weight", "bias"))
  assert round(bias.item(), 4) == 3.5294 and round(np.linalg.norm(weight), 2) == 28.44
  want = features() @ weight[0] + bias
  got = aesthetic_scores.apply_head(read_head(root / name, name), features().astype(np.float32))
  assert got.dtype == np.float32 and np.ptp(want) > 1
  np.testing.assert_allclose(got, want, rtol=1e-6)


@as_published
@live
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_laions_files_are_affine(version, root, capsys):
  published: Published = {"v1": aesthetic.V1, "v2": aesthetic.V2}[version]
  assert run(capsys, published.name, Path(LAION) / published.file)[0] == 0
  directory = root / published.name
  if version == "v1":
    golden = load_file(GOLDEN / "laion_v1.safetensors")
    weight, bias = golden["weight"][0].astype(np.float64), float(golden["bias"][0])
  else:
    golden = np.load(GOLDEN / "laion_v2_affine.npz")
    weight, bias = golden["weight"], float(golden["bias"])
    assert round(bias, 4) == 5.2366 and round(np.linalg.norm(weight), 2) == 18.00
  head = read_head(directory, published.name)
  want = features() @ weight + bias
  got = aesthetic_scores.apply_head(head, features().astype(np.float32))
  np.testing.assert_allclose(got, want, rtol=2e-6)
  wide = jax.tree.map(lambda x: x.astype(np.float64), head)
  exact = aesthetic_scores.apply_head(wide, features())
  np.testing.assert_allclose(exact, want, rtol=1e-12)
