"""Whole runs through the command line: outputs, continuations, other devices."""

import json
import os
import re
import shutil
import signal

import flax
import jax
import numpy as np
import pytest
import runs
from conftest import ROOT, start_cluster
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpref import main
from jaxpref.data.images import decode
from jaxpref.evaluation import diversity, evaluate, vendi
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.runtime import checkpoint_files, metrics
from jaxpref.shapes import prompts
from jaxpref.training import load_run, rollout, train_step


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tmp_path_factory, tfds_dir):
  """An uninterrupted run of DRO, whose programs may neither move data nor be compiled twice."""
  workdir = tmp_path_factory.mktemp("runs") / "dro"
  jitted = []

  def guard(make):
    def made(*args, **kwargs):
      jitted.append(program := make(*args, **kwargs))

      def call(*arguments, **static):
        with jax.transfer_guard("disallow"):
          return program(*arguments, **static)

      return call

    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    patch.setattr(train_step, "make_train_step", guard(train_step.make_train_step))
    patch.setattr(rollout, "make_rollout", guard(rollout.make_rollout))
    assert main.main(runs.arguments(tiny_pipeline, workdir, profile=1)) == 0
  assert [program._cache_size() for program in jitted] == [1, 1]
  return workdir


def test_a_run_leaves_what_it_promises(finished, capsys):
  lines = runs.lines(finished)
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  for name in (
    "loss",
    "err/policy_e",
    "err/policy_p",
    "err/reference_e",
    "rewards/margin",
    "rewards/accuracy",
    "dro/active",
    "optim/grad_norm",
    "perf/rows_per_second",
    "perf/images_per_second",
    "perf/tflops_per_second",
    "perf/compile_seconds",
    "time/data",
    "time/rollout",
    "time/update",
  ):
    assert all(np.isfinite(line[name]) for line in lines), name
  assert lines[0]["loss"] == pytest.approx(0.05, rel=1e-3)  # m, where policy = reference
  assert checkpoint_files.steps(finished / "checkpoints") == [2, 4]
  assert json.loads((finished / "config.json").read_text())["loss"]["margin"] == 0.05
  results = json.loads((finished / "evaluation" / "4" / "results.json").read_text())
  for entry in results.values():
    assert entry["base"].keys() >= {"mean", "std", "n"}
    assert entry["base"]["n"] == entry["tuned"]["n"] == 6
    assert entry["win"] + entry["tie"] + entry["loss"] == pytest.approx(1.0)
    assert len(entry["interval"]) == 2 and "p_value" in entry
  spread = json.loads((finished / "evaluation" / "4" / "diversity.json").read_text())
  images = sorted((finished / "evaluation" / "4" / "images" / "tuned").iterdir())
  vendi_score = vendi.vendi_score(diversity.pixel_features([decode(file) for file in images]))
  assert spread["overall"]["tuned"]["vendi"] == pytest.approx(vendi_score)
  assert len(images) == 6 and Image.open(images[0]).size == (16, 16)
  html = (finished / "report.html").read_text()
  assert f"{spread['overall']['tuned']['vendi']:.3f}" in html
  assert "data:image/png;base64" in html
  assert list((finished / "profile").rglob("*.xplane.pb"))
  assert not re.search(r"""(?:src|href)=["']?(?!data:|#|["'])""", html)


@pytest.mark.long
def test_processes_and_devices_may_change_on_the_way(finished, tiny_pipeline, tmp_path):
  """Two processes, each of two devices, and then one device."""
  workdir, log = tmp_path / "elastic", tmp_path / "log"
  fields = {"train.num_updates": 2, "evaluate.num_prompts": 1}
  arguments = runs.arguments(tiny_pipeline, workdir, **fields)
  assert start_cluster(2, 2, arguments, log).wait(300) == 0, log.read_text()[-2000:]
  assert len(runs.lines(workdir)) == 2
  assert main.main(runs.arguments(tiny_pipeline, workdir)) == 0
  starts = json.loads((workdir / "starts.json").read_text())
  found = [(start["after_update"], start["devices"]) for start in starts]
  assert found == [(0, "4 x cpu, 2 processes"), (2, "1 x cpu")]
  for ours, theirs in zip(runs.lines(workdir), runs.lines(finished), strict=True):
    for name in ("loss", "err/policy_e", "err/reference_e"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
  ours, theirs = runs.parameters(workdir)[1], runs.parameters(finished)[1]
  paths = [path for path in theirs if path.startswith("/params/")]
  apart = np.concatenate([np.abs(ours[path] - theirs[path]).ravel() for path in paths])
  # An Adam step is lr long whatever the gradient: where that is near nothing, its sign is
  # rounding's, in each of the four updates.
  assert apart.max() < 8 * 3e-4 and np.mean(apart > 3e-5) < 0.02


def test_stopped_and_started_again_it_ends_the_same(
  finished, tiny_pipeline, tmp_path, monkeypatch, capsys
):
  workdir = tmp_path / "run"
  arguments = runs.arguments(tiny_pipeline, workdir)
  write = metrics.MetricWriter.write

  def write_and_ask(self, step, values):
    write(self, step, values)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricWriter, "write", write_and_ask)
    assert main.main(arguments) == 143
  assert "saved after update 3 of 4" in capsys.readouterr().err
  assert checkpoint_files.steps(workdir / "checkpoints") == [2, 3]
  assert main.main(arguments) == 0
  runs.check_same(workdir, finished)


@pytest.mark.long
def test_killed_and_started_again_it_ends_the_same(finished, tiny_pipeline, tmp_path, capsys):
  workdir, log = tmp_path / "run", tmp_path / "log"
  arguments = runs.arguments(tiny_pipeline, workdir)
  runs.kill(arguments, workdir, log, saved=2, logged=3)
  assert not (workdir / "report.html").exists()
  capsys.readouterr()
  assert main.main(arguments) == 0
  assert "resuming after update 2 of 4" in capsys.readouterr().err
  runs.check_same(workdir, finished)
  timeless = lambda line: {  # noqa: E731
    k: v for k, v in line.items() if k != "time" and not k.startswith(("time/", "perf/"))
  }
  want = [timeless(line) for line in runs.lines(finished)]
  assert [timeless(line) for line in runs.lines(workdir)] == want


@pytest.mark.long
def test_a_finished_run_is_only_evaluated_again(finished, tiny_pipeline, monkeypatch):
  before = runs.parameters(finished)
  lines = runs.lines(finished)
  compared = {}
  judge = evaluate.evaluate

  def spy(base, models, *rest, **options):
    compared.update(models)
    return judge(base, models, *rest, **options)

  monkeypatch.setattr(evaluate, "evaluate", spy)
  assert main.main(runs.arguments(tiny_pipeline, finished)) == 0
  after = runs.parameters(finished)
  assert after[0] == before[0] and runs.lines(finished) == lines
  for path, array in before[1].items():
    np.testing.assert_array_equal(after[1][path], array, err_msg=path)
  # The averages, against the weights of the pipeline.
  flat = flax.traverse_util.flatten_dict(compared["tuned"], sep="/")
  for path, array in flat.items():
    np.testing.assert_array_equal(array, before[1][f"/ema/{path}"], err_msg=path)
  want = pipeline_lib.load_pipeline(str(tiny_pipeline)).params["unet"]
  jax.tree.map(np.testing.assert_array_equal, compared["base"], want)
  stored = (finished / "config.json").read_bytes()
  fewer = runs.arguments(tiny_pipeline, finished, **{"train.num_updates": 3})
  assert main.main(fewer) == 2
  assert (finished / "config.json").read_bytes() == stored


@pytest.mark.long
def test_what_a_run_began_with_must_stay(tiny_pipeline, tmp_path, capsys):
  copy = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
  fields = {"optim.schedule": "cosine", "train.num_updates": 1}
  arguments = runs.arguments(copy, tmp_path / "run", "sft", **fields)
  assert main.main(arguments) == 0
  longer = runs.arguments(copy, tmp_path / "run", "sft", **fields | {"train.num_updates": 2})
  assert main.main(longer) == 2
  assert "train.num_updates was 1, now 2: that would change" in capsys.readouterr().err
  weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(weights)
  tensors["conv_in.bias"] += 1e-3
  save_file(tensors, weights)
  assert main.main(arguments) == 2
  assert f"the base pipeline's weights ({copy}) have changed" in capsys.readouterr().err


@pytest.mark.long
def test_the_best_checkpoint_stays(tiny_pipeline, tmp_path, capsys):
  workdir = tmp_path / "run"
  fields = {"train.num_updates": 6, "train.keep": 1, "evaluate.every": 1, "optim.lr": 3e-3}
  arguments = runs.arguments(tiny_pipeline, workdir, "sft", **fields)
  arguments.append("--config.evaluate.scorers=('shapes.quality',)")
  assert main.main(arguments) == 0
  means = {}
  for update in (2, 4, 6):
    text = (workdir / "evaluation" / str(update) / "results.json").read_text()
    means[update] = json.loads(text)["shapes.quality-2"]["tuned"]["mean"]
  best = max(means, key=lambda update: (means[update], -update))
  noted = {"update": best, "scorer": "shapes.quality-2", "mean": means[best]}
  assert json.loads((workdir / "best.json").read_text()) == noted
  kept = max((2, 4), key=lambda update: (means[update], -update))  # when the last was saved
  assert checkpoint_files.steps(workdir / "checkpoints") == [kept, 6]
  assert f"update {best} by shapes.quality-2" in (workdir / "report.html").read_text()
  digest = load_run.load(str(workdir), step="best").digest
  assert digest == load_run.load(str(workdir), step=best).digest
  # Started again without one of them, it makes that evaluation before it goes on.
  before = runs.parameters(workdir)[1]
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "evaluation" / str(kept) / "results.json").unlink()
  capsys.readouterr()
  assert main.main(arguments) == 0
  for path, array in runs.parameters(workdir)[1].items():
    np.testing.assert_array_equal(before[path], array, err_msg=path)
  assert json.loads((workdir / "best.json").read_text()) == noted
  # Evaluations of other prompts do not compare with these.
  assert main.main([*arguments, "--config.evaluate.num_prompts=4"]) == 0
  assert json.loads((workdir / "best.json").read_text())["update"] == 6


def test_no_updates_leave_the_base(tiny_pipeline, tmp_path, capsys):
  arguments = runs.arguments(tiny_pipeline, tmp_path / "none", **{"train.num_updates": 0})
  assert main.main(arguments) == 0
  results = json.loads((tmp_path / "none" / "evaluation" / "0" / "results.json").read_text())
  assert all(entry["tie"] == 1.0 for entry in results.values())
  printed = capsys.readouterr().out
  for key in (*results, *prompts.CATEGORIES, "On 6 held-out prompts, it is undecided"):
    assert key in printed
  assert f"report: {tmp_path / 'none' / 'report.html'}" in printed


def test_pictures_of_ones_own(tiny_pipeline, tmp_path, capsys):
  skimage_data = pytest.importorskip("skimage.data")
  folder = tmp_path / "mine"
  folder.mkdir()
  photographs = {
    "astronaut": "a portrait of an astronaut",
    "coffee": "a cup of coffee on a table",
    "chelsea": "a cat that looks at you",
    "rocket": "a rocket on its pad",
  }
  for name, text in photographs.items():
    Image.fromarray(getattr(skimage_data, name)()).save(folder / f"{name}.jpg")
    (folder / f"{name}.txt").write_text(text)
  (folder / "broken.jpg").write_bytes(b"not a picture")
  (folder / "broken.txt").write_text("nothing")
  fields = {"data.source": "folder", "data.path": folder}
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "run", **fields)) == 0
  printed = capsys.readouterr().err
  assert "1 file cannot be used: broken.jpg (not an image: begins with " in printed
  assert "not scored with shapes.correct, shapes.quality" in printed
  html = (tmp_path / "run" / "report.html").read_text()
  assert any(text in html for text in photographs.values())
  images = tmp_path / "run" / "evaluation" / "4" / "images" / "tuned"
  assert len(list(images.iterdir())) == 4


def test_the_workdir_of_another_run_is_refused(finished, tiny_pipeline, capsys):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  assert main.main([*runs.arguments(tiny_pipeline, finished), "--config.optim.lr=0.1"]) == 2
  assert "holds another run: optim.lr was 0.0003, now 0.1" in capsys.readouterr().err
  after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  assert {p: t for p, t in after.items() if p.name != ".lock"} == {
    p: t for p, t in before.items() if p.name != ".lock"
  }
