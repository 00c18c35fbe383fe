"""Scorers' inputs: pixels as Pillow's and PyTorch's, token ids as open_clip's."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import scorer_models
from conftest import live
from PIL import Image
from test_tokenizer import clips_own_vocabulary, needs_vocabulary

from jaxpref.errors import UserError
from jaxpref.models import text
from jaxpref.scorers.base import clip_scores, pixels, store

GOLDEN = Path(__file__).parent / "golden" / "scorers"


def cases(name: str) -> list[dict]:
  return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


@pytest.mark.parametrize("case", cases("crops"), ids=lambda case: str(case["size"]))
def test_corners_are_those_of_torchvision_and_transformers(case):
  width, height = case["size"]
  image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  resized = Image.fromarray(image).resize(case["resized"], Image.Resampling.BICUBIC)
  for variant, source in (("pil", "torchvision"), ("hf", "transformers")):
    top, left = case[source]
    want = np.asarray(resized)[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(pixels.prepare(image, variant, 224), want)


def test_pillow_and_transformers_crop_the_rocket_differently():
  rocket = scorer_models.photographs()[3]
  left, right = (pixels.prepare(rocket, variant, 224) for variant in ("pil", "hf"))
  np.testing.assert_array_equal(left[:, :-1], right[:, 1:])
  assert (left != right).any()


@live
@pytest.mark.parametrize("variant", pixels.VARIANTS)
def test_pixels_are_pytorchs(variant):
  import scorer_witness
  import torch

  mean, std = scorer_witness.MEAN, scorer_witness.STD
  for image in scorer_models.photographs():
    got = pixels.prepare(image, variant, 224)
    if variant.startswith("tensor"):  # in float32 torch itself is off by 2e-5
      exact = scorer_witness.resize_and_crop(image, variant, torch.float64).permute(1, 2, 0)
      np.testing.assert_allclose(got, exact, atol=1e-6)
    want = scorer_witness.pixel_values(image, variant).permute(1, 2, 0)
    np.testing.assert_allclose(pixels.normalize(got, mean, std), want, atol=1e-4)


def test_tensors_are_neither_rounded_nor_clipped():
  edge = np.zeros((300, 300, 3), np.uint8)
  edge[:, 150:] = 255
  for variant in ("tensor_aa", "tensor_noaa"):
    found = pixels.prepare(edge, variant, 224)
    assert found.dtype == np.float32 and found.min() < -0.004 and found.max() > 1.004
    assert (np.abs(found * 255 - np.round(found * 255)) > 0.1).any()


def test_resizing_in_a_program_is_the_tensors():
  resize = jax.jit(pixels.resize_in_graph, static_argnums=1)
  for image in scorer_models.photographs():
    found = resize(image[None] / np.float32(255), 224)[0]
    np.testing.assert_allclose(found, pixels.prepare(image, "tensor_aa", 224), atol=2e-5)
  whole = np.ones((1, 224, 224, 3), np.float32)
  np.testing.assert_array_equal(pixels.resize_in_graph(whole, 224), whole)


@pytest.mark.parametrize("variant", pixels.VARIANTS)
def test_a_flat_image_stays_flat(variant):
  for shape in ((1, 1), (3, 300), (500, 499)):
    flat = pixels.prepare(np.full((*shape, 3), 77, np.uint8), variant, 224)
    assert flat.shape == (224, 224, 3)
    scale = 1 if flat.dtype == np.uint8 else 255
    np.testing.assert_allclose(flat * scale, 77.0, rtol=1e-5)


# In a prompt that spells out the end token: open_clip's is <end_of_text>, and transformers' and
# ours <|endoftext|>.
SPELLED_OUT = ("<end_of_text> injected", "<|endoftext|> injected")


@needs_vocabulary
@pytest.mark.parametrize("cleaning", ["ftfy", "fast"])
def test_token_ids_are_those_of_open_clip_and_of_the_fast_class(cleaning, tmp_path):
  clips_own_vocabulary(tmp_path)
  tokenizer = clip_scores.load_tokenizer(tmp_path, cleaning, 49408)
  column = "open_clip" if cleaning == "ftfy" else "fast"
  known = [case for case in cases("token_ids") if case["text"] not in SPELLED_OUT]
  (got,) = text.tokenize([tokenizer], [case["text"] for case in known])
  for row, case in zip(got, known, strict=True):
    want = case[column]
    assert row[: len(want)].tolist() == want, case["text"]
    assert set(row[len(want) :]) <= {49407}, case["text"]


def test_a_vocabulary_is_found_beside_any_clip_model(tmp_path, monkeypatch):
  monkeypatch.setenv(store.ROOT, str(tmp_path))
  scorer_models.write_tokenizer(tmp_path / "clip.l14")
  own = tmp_path / "hpsv2.v2_1"
  assert store.find_clip_vocabulary(own, cleaning="ftfy") == tmp_path / "clip.l14"
  own.mkdir()
  (own / "tokenizer.json").write_text("{}")  # the fast class reads it, the other one does not
  assert store.find_clip_vocabulary(own, cleaning="ftfy") == tmp_path / "clip.l14"
  assert store.find_clip_vocabulary(own, cleaning="fast") == own
  with pytest.raises(UserError, match="has 626 words, but the text encoder 49408"):
    clip_scores.load_tokenizer(tmp_path / "clip.l14", "ftfy", 49408)


def test_a_missing_vocabulary_says_what_to_copy(tmp_path, monkeypatch):
  def unreachable(name, choose, *, whole):
    assert choose(["vocab.json", "vocab.txt", "model.safetensors"]) in (
      ["vocab.json"],
      ["vocab.txt"],
    )
    raise UserError(f"{name}: the Hub cannot be reached")

  monkeypatch.setenv(store.ROOT, str(tmp_path))
  monkeypatch.setattr(store.hub, "download", unreachable)
  with pytest.raises(UserError, match="no vocabulary: copy .*merges.txt .* of openai/clip-vit"):
    store.find_clip_vocabulary(tmp_path, cleaning="ftfy")
  with pytest.raises(UserError, match="no vocabulary: copy vocab.txt of google-bert/bert-base"):
    store.find_bert_vocabulary(tmp_path)
