"""The shapes world's preference model: how it is trained, and the model that ships."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from jaxpref import scorers
from jaxpref.models import preference_towers
from jaxpref.pretrain import preference_run, train_preference
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import checkpoint
from jaxpref.scorers.base import preference_scores
from jaxpref.shapes import builder

PAIRS = 160
MODEL = {
  "image_size": 16,
  "channels": [8, 8],
  "width": 6,
  "text_config": {
    "hidden_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 5,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 9,
  },
}


@pytest.fixture(scope="module")
def held_out():
  """The first pairs of held-out prompts that are not ties: images and captions."""
  good, bad, captions = [], [], []
  for i in range(PAIRS):
    row = builder.draw_pair(i, split="test", seed=0)
    if row["label_0"] != 0.5:
      images = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{k}"]))) for k in (0, 1)]
      first = row["label_0"] == 1.0
      good.append(images[not first])
      bad.append(images[first])
      captions.append(row["caption"])
  return preference_run.Pairs(np.stack(good), np.stack(bad), captions)


def test_it_ranks_held_out_pairs_as_the_annotator_does(held_out):
  """On 147 pairs; with chance, the deviations of the two shares are 4 and 6 %."""
  assert preference_scores.BUNDLED.joinpath("model.safetensors").stat().st_size <= 5e6
  card = preference_scores.BUNDLED.joinpath("README.md").read_text()
  assert "| the annotator's choice, without ties |" in card
  found = preference_run.accuracies(preference_scores.load_preference(), held_out)
  assert found["annotator"][0] > 0.62 and found["annotator"][1] == len(held_out.captions)
  assert found["verifier"][0] > 0.8 and 30 < found["verifier"][1] < PAIRS


def test_both_interfaces_give_one_score(held_out):
  """Of images of the model's own size, which are not resized."""
  small = np.stack([np.asarray(Image.fromarray(x).reduce(2)) for x in held_out.preferred[:6]])
  captions = held_out.captions[:6]
  version, score = scorers.load_scorers(["shapes.preference"])["shapes.preference"]
  params, tokenize, in_graph = scorers.load_reward("shapes.preference")
  found = jax.jit(in_graph)(params, small.astype(np.float32) / 255, tokenize(captions))
  np.testing.assert_allclose(found, score(small, captions), rtol=1e-5, atol=1e-5)
  assert version == "1" and np.std(found) > 0.01
  assert score(small[:0], []).shape == (0,)
  other = score(small, captions[1:] + captions[:1])
  assert np.abs(other - found).max() > 0.01  # prompts count


def test_the_gradient_is_that_of_finite_differences(held_out):
  """In the images, also of another size, by double precision along a direction."""
  params, tokenize, score = scorers.load_reward("shapes.preference")
  images = jnp.asarray(held_out.preferred[:2, :48, :48] / 255.0, jnp.float32)
  ids = tokenize(held_out.captions[:2])
  total = jax.jit(lambda x: score(params, x, ids).sum())
  gradient = jax.jit(jax.grad(total))(images)
  assert np.isfinite(gradient).all()
  along = gradient / jnp.linalg.norm(gradient)
  step = 0.02
  slope = (total(images + step * along) - total(images - step * along)) / (2 * step)
  assert float(slope) == pytest.approx(float(jnp.linalg.norm(gradient)), rel=0.02)


def test_the_loss_is_its_equation():
  towers = preference_towers.build_towers(MODEL)
  params = train_preference.init_params(towers, jax.random.key(0), encoder=None)
  rng = np.random.default_rng(0)
  good, bad = rng.integers(0, 256, (2, 4, 16, 16, 3), np.uint8)
  ids = np.array([[7, 1, 8, 8, 8], [7, 2, 3, 8, 8], [7, 1, 8, 8, 8], [7, 4, 4, 4, 8]])
  see, read = (
    jax.jit(functools.partial(features, towers, params["towers"]))
    for features in (preference_towers.image_features, preference_towers.text_features)
  )
  of = lambda x: np.asarray(see((x / 255 - 0.5) / 0.25), np.float64)  # noqa: E731
  text = np.asarray(read(ids), np.float64)
  np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(text[0], text[2])
  margin = 10 * ((of(good) - of(bad)) * text).sum(1)
  pairs = np.log1p(np.exp(-margin)).mean()
  logits = of(good) @ text.T / 0.07
  logits[0, 2] = logits[2, 0] = -np.inf  # the same prompt is not a wrong one
  rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
  contrast = -(np.diag(rows).mean() + np.diag(columns).mean()) / 2
  loss, parts = jax.jit(
    functools.partial(train_preference.preference_loss, towers, contrast=0.5)
  )(params, good, bad, ids)
  np.testing.assert_allclose(loss, pairs + 0.5 * contrast, rtol=1e-5)
  np.testing.assert_allclose(parts["pairs"], pairs, rtol=1e-5)
  np.testing.assert_allclose(parts["accuracy"], (margin > 0).mean())


@pytest.mark.long
def test_a_run_that_is_interrupted_ends_with_the_same_weights(
  tfds_dir, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  options = ["--config=configs/shapes_preference.py:tiny"]

  def run(name):
    return pretrain.main([*options, f"--workdir={tmp_path / name}"])

  assert run("whole") == 0, capsys.readouterr().err
  save = checkpoint.Checkpointer.save

  def save_and_stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, "save", save_and_stop)
    assert run("cut") == 130
  assert run("cut") == 0
  models = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
  assert models[0].read_bytes() == models[1].read_bytes()
  lines = (tmp_path / "cut/preference/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]
  card = (tmp_path / "cut/model/README.md").read_text()
  assert "| training | 2 updates of 8 pairs |" in card
