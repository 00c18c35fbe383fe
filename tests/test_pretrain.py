"""Pretraining: a whole run in small, interrupted and continued, the pipeline it leaves."""

import json

import numpy as np
import pytest
from conftest import ROOT

from jaxpref.models import pipeline
from jaxpref.pretrain import run as pretrain
from jaxpref.runtime import checkpoint, checkpoint_files


def _run(workdir, capsys, *extra):
  arguments = ["--config=configs/shapes_base.py:tiny", f"--workdir={workdir}", *extra]
  assert pretrain.main(arguments) == 0, capsys.readouterr().err
  return pipeline.load_pipeline(str(workdir / "pipeline"))


@pytest.mark.long
def test_a_run_in_small(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  made = _run(tmp_path / "run", capsys)
  assert made.image_size == 16 and made.latent_shape == (4, 8, 8)
  # Latents have unit variance after scaling.
  factor = made.modules["vae"].scaling_factor
  assert 0 < factor < 1e4
  card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
  assert "| missing_object | 10 % |" in card
  assert (tmp_path / "run" / "pipeline" / "training-1.png").stat().st_size > 1000
  steps = [
    json.loads(line)["step"]
    for line in (tmp_path / "run" / "denoiser" / "metrics.jsonl").read_text().splitlines()
  ]
  assert steps == [1, 2]
  # The same command again finds everything done and exports the same weights.
  _assert_same(_run(tmp_path / "run", capsys), made)


@pytest.mark.long
def test_trained_on_interrupted_and_continued(tmp_path, tiny_pipeline, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  options = [f"--config.{part}.path={tiny_pipeline}" for part in ("vae", "denoiser")]
  options += ["--config.vae.num_updates=0", "--config.denoiser.lr=1e-6"]
  whole = _run(tmp_path / "whole", capsys, *options)
  before = pipeline.load_pipeline(str(tiny_pipeline))
  # The VAE is the other pipeline's.
  for a, b in zip(_leaves(before.params["vae"]), _leaves(whole.params["vae"]), strict=True):
    np.testing.assert_array_equal(a.astype(np.float16), b.astype(np.float16))
  assert not (tmp_path / "whole" / "vae").exists()
  # Two updates at a learning rate of nothing: the weights it began with, as float16.
  for part in ("unet", "text_encoder"):
    pairs = zip(_leaves(before.params[part]), _leaves(whole.params[part]), strict=True)
    assert all(np.allclose(a, b, atol=2e-5, rtol=1e-3) for a, b in pairs)
  card = (tmp_path / "whole" / "pipeline" / "README.md").read_text()
  assert f"the weights of `{tiny_pipeline}`, trained on for 2 updates of 4 images" in card
  assert f"| VAE | the weights of `{tiny_pipeline}` |" in card
  save = checkpoint.Checkpointer.save

  def save_and_stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt

  arguments = ["--config=configs/shapes_base.py:tiny", f"--workdir={tmp_path / 'cut'}"]
  arguments += options
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, "save", save_and_stop)
    assert pretrain.main(arguments) == 130
  assert checkpoint_files.steps(tmp_path / "cut" / "denoiser" / "checkpoints") == [1]
  _assert_same(_run(tmp_path / "cut", capsys, *options), whole)
  # Checkpoints of another corpus are not continued.
  monkeypatch.setattr(pretrain, "_fingerprint", lambda *_: "another")
  assert pretrain.main(arguments) == 2
  assert "was trained on another corpus or from other weights" in capsys.readouterr().err
  # The bundled pipeline is wider than the tiny configuration's.
  for part, name in (("vae", "vae"), ("denoiser", "unet")):
    arguments = ["--config=configs/shapes_base.py:tiny", f"--config.{part}.path=shapes"]
    assert pretrain.main([*arguments, f"--workdir={tmp_path / 'other'}"]) == 2
    assert f"{part}.path: the {name} of 'shapes' has other shapes" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_a_decoder_is_trained_on(tmp_path, tiny_pipeline, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  taken = pipeline.load_pipeline(str(tiny_pipeline))
  options = [f"--config.{part}.path={tiny_pipeline}" for part in ("vae", "denoiser")]
  options += ["--config.vae.edge_weight=1", "--config.denoiser.num_updates=0"]
  made = _run(tmp_path / "run", capsys, *options)
  half = lambda tree: [leaf.astype(np.float16) for leaf in _leaves(tree)]  # noqa: E731
  for part, tree in taken.params.items():
    for name in tree:
      same = all(map(np.array_equal, half(tree[name]), half(made.params[part][name])))
      assert same == (name not in ("decoder", "post_quant_conv")), name
  assert made.configs["vae"] == taken.configs["vae"]  # scaling_factor, too
  curves = [
    json.loads(x) for x in (tmp_path / "run/vae/metrics.jsonl").read_text().splitlines()
  ]
  parts = [c["l1"] + c["mse"] + 1e-5 * c["kl"] + c["edges"] for c in curves]
  np.testing.assert_allclose([c["loss"] for c in curves], parts, rtol=1e-5)
  # Trained on once more, the card tells of both rounds.
  again = str(tmp_path / "run" / "pipeline")
  options = [f"--config.{part}.path={again}" for part in ("vae", "denoiser")]
  _run(tmp_path / "again", capsys, *options, "--config.vae.num_updates=0")
  card = tmp_path / "again" / "pipeline" / "README.md"
  assert "### 2" in card.read_text() and card.with_name("training-1.png").exists()
  kept = f"the weights of `{tiny_pipeline}`, its decoder trained on for 2 updates"
  assert kept in card.read_text()
  arguments = ["--config=configs/shapes_base.py:tiny", "--config.vae.num_updates=0"]
  assert pretrain.main([*arguments, f"--workdir={tmp_path / 'none'}"]) == 2
  assert "vae.num_updates is 0 and vae.path is empty" in capsys.readouterr().err


def _assert_same(ours, theirs):
  for part, tree in theirs.params.items():
    for a, b in zip(_leaves(ours.params[part]), _leaves(tree), strict=True):
      np.testing.assert_array_equal(a, b)


def _leaves(tree):
  if isinstance(tree, dict):
    return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
  return [tree]
