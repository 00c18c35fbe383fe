"""Whole runs through the command line: outputs, kill -9, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import flax
import jax
import numpy as np
import pytest
from conftest import ROOT, WITHOUT_TORCH, start_cluster, xla_flags
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxpref import checkpoint, main, metrics, rollouts, steps, tuned
from jaxpref.data.shapes import prompts
from jaxpref.evaluation import evaluate
from jaxpref.models import pipeline as pipeline_lib


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


def _arguments(pipeline, workdir, method="dro", **fields):
  overrides = {"model.path": pipeline} | fields
  return [
    f"--config=configs/{method}.py:tiny",
    f"--workdir={workdir}",
    *(f"--config.{name.replace('__', '.')}={value}" for name, value in overrides.items()),
  ]


def _parameters(workdir):
  """Every array of the newest checkpoint, by its path."""
  directory = workdir / "checkpoints"
  newest = max(checkpoint.steps(directory))
  # Onto one device, whatever mesh wrote it.
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    ocp.checkpointables_metadata(directory / str(newest)).metadata["state"],
  )
  state = ocp.load_checkpointables(directory / str(newest), {"state": abstract})["state"]
  flat = {}

  def visit(tree, path):
    if isinstance(tree, dict):
      for key, value in tree.items():
        visit(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
      for key, value in enumerate(tree):
        visit(value, f"{path}/{key}")
    elif tree is not None:
      flat[path] = np.asarray(tree)

  visit(state, "")
  return newest, flat


def _lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_pipeline, tmp_path_factory, tfds_dir):
  """An uninterrupted run of DRO, whose programs may neither move data nor be compiled twice."""
  workdir = tmp_path_factory.mktemp("runs") / "dro"
  jitted = []

  def guard(make):
    def made(*args, **kwargs):
      jitted.append(program := make(*args, **kwargs))

      def call(*arguments):
        with jax.transfer_guard("disallow"):
          return program(*arguments)

      return call

    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    patch.setattr(steps, "make_train_step", guard(steps.make_train_step))
    patch.setattr(rollouts, "make_rollout", guard(rollouts.make_rollout))
    assert main.main(_arguments(tiny_pipeline, workdir, profile=1)) == 0
  assert [program._cache_size() for program in jitted] == [1, 1]
  return workdir


def test_a_run_leaves_what_it_promises(finished, capsys):
  lines = _lines(finished)
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
  assert checkpoint.steps(finished / "checkpoints") == [2, 4]
  assert json.loads((finished / "config.json").read_text())["loss"]["margin"] == 0.05
  results = json.loads((finished / "evaluation" / "4" / "results.json").read_text())
  for entry in results.values():
    assert entry["base"].keys() >= {"mean", "std", "n"}
    assert entry["base"]["n"] == entry["tuned"]["n"] == 6
    assert entry["win"] + entry["tie"] + entry["loss"] == pytest.approx(1.0)
    assert len(entry["interval"]) == 2 and "p_value" in entry
  images = sorted((finished / "evaluation" / "4" / "images" / "tuned").iterdir())
  assert len(images) == 6 and Image.open(images[0]).size == (16, 16)
  html = (finished / "report.html").read_text()
  assert "data:image/png;base64" in html
  assert list((finished / "profile").rglob("*.xplane.pb"))
  assert not re.search(r"""(?:src|href)=["']?(?!data:|#|["'])""", html)


def _start(arguments, log, *, devices):
  flags = xla_flags(devices=devices)
  return subprocess.Popen(
    [sys.executable, "-m", "jaxpref.main", *arguments],
    cwd=ROOT,
    env=os.environ | WITHOUT_TORCH | {"XLA_FLAGS": flags},
    stdout=log.open("a"),
    stderr=subprocess.STDOUT,
  )


def test_processes_and_devices_may_change_on_the_way(finished, tiny_pipeline, tmp_path):
  """Four processes, then two, each of two devices, and at last one device."""
  workdir, log = tmp_path / "elastic", tmp_path / "log"
  for updates, processes in ((2, 4), (3, 2)):
    fields = {"train.num_updates": updates, "evaluate.num_prompts": 1}
    arguments = _arguments(tiny_pipeline, workdir, **fields)
    assert start_cluster(processes, 2, arguments, log).wait(300) == 0, log.read_text()[-2000:]
    assert len(_lines(workdir)) == updates
  assert main.main(_arguments(tiny_pipeline, workdir)) == 0
  starts = json.loads((workdir / "starts.json").read_text())
  found = [(start["after_update"], start["devices"]) for start in starts]
  assert found == [(0, "8 x cpu, 4 processes"), (2, "4 x cpu, 2 processes"), (3, "1 x cpu")]
  for ours, theirs in zip(_lines(workdir), _lines(finished), strict=True):
    for name in ("loss", "err/policy_e", "err/reference_e"):
      assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
  ours, theirs = _parameters(workdir)[1], _parameters(finished)[1]
  paths = [path for path in theirs if path.startswith("/params/")]
  apart = np.concatenate([np.abs(ours[path] - theirs[path]).ravel() for path in paths])
  # An Adam step is lr long whatever the gradient: where that is near nothing, its sign is
  # rounding's, in each of the four updates.
  assert apart.max() < 8 * 3e-4 and np.mean(apart > 3e-5) < 0.02


def test_sigterm_to_one_process_stops_all_after_a_save(tiny_pipeline, tmp_path):
  workdir, log = tmp_path / "run", tmp_path / "log"
  fields = {"train.num_updates": 100_000, "train.updates_per_iteration": 100_000}
  process = start_cluster(2, 1, _arguments(tiny_pipeline, workdir, **fields), log)
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (workdir / "metrics.jsonl").exists():
    time.sleep(0.05)
  # The script is told, and tells them.
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143, log.read_text()[-2000:]
  (step,) = checkpoint.steps(workdir / "checkpoints")
  said = f"asked to stop (SIGTERM), saved after update {step} of 100000; the same command"
  assert log.read_text().count(said) == 2, log.read_text()[-2000:]


def test_stopped_and_started_again_it_ends_the_same(
  finished, tiny_pipeline, tmp_path, monkeypatch, capsys
):
  workdir = tmp_path / "run"
  arguments = _arguments(tiny_pipeline, workdir)
  write = metrics.MetricWriter.write

  def write_and_ask(self, step, values):
    write(self, step, values)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricWriter, "write", write_and_ask)
    assert main.main(arguments) == 143
  assert "saved after update 3 of 4" in capsys.readouterr().err
  assert checkpoint.steps(workdir / "checkpoints") == [2, 3]
  assert main.main(arguments) == 0
  ours, theirs = _parameters(workdir)[1], _parameters(finished)[1]
  for path, array in theirs.items():
    np.testing.assert_array_equal(ours[path], array, err_msg=path)


def test_killed_and_started_again_it_ends_the_same(finished, tiny_pipeline, tmp_path, capsys):
  workdir, log = tmp_path / "run", tmp_path / "log"
  arguments = _arguments(tiny_pipeline, workdir)
  process = _start(arguments, log, devices=1)
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and process.poll() is None:
    file = workdir / "metrics.jsonl"
    saved = (workdir / "checkpoints" / "2" / "checksums.json").exists()
    if saved and file.exists() and file.read_bytes().count(b"\n") >= 3:
      break
    time.sleep(0.002)
  assert process.poll() is None, log.read_text()[-2000:]
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not (workdir / "report.html").exists()
  capsys.readouterr()
  assert main.main(arguments) == 0
  assert "continuing after update 2 of 4" in capsys.readouterr().err
  ours, theirs = _parameters(workdir), _parameters(finished)
  assert ours[0] == theirs[0]
  for path, array in theirs[1].items():
    np.testing.assert_array_equal(ours[1][path], array, err_msg=path)
  timeless = lambda line: {  # noqa: E731
    k: v for k, v in line.items() if k != "time" and not k.startswith(("time/", "perf/"))
  }
  want = [timeless(line) for line in _lines(finished)]
  assert [timeless(line) for line in _lines(workdir)] == want


def test_a_finished_run_is_only_evaluated_again(finished, tiny_pipeline, monkeypatch):
  before = _parameters(finished)
  lines = _lines(finished)
  compared = {}
  judge = evaluate.evaluate

  def spy(base, models, *rest, **options):
    compared.update(models)
    return judge(base, models, *rest, **options)

  monkeypatch.setattr(evaluate, "evaluate", spy)
  assert main.main(_arguments(tiny_pipeline, finished)) == 0
  after = _parameters(finished)
  assert after[0] == before[0] and _lines(finished) == lines
  for path, array in before[1].items():
    np.testing.assert_array_equal(after[1][path], array, err_msg=path)
  # The averages, against the weights of the pipeline.
  flat = flax.traverse_util.flatten_dict(compared["tuned"], sep="/")
  for path, array in flat.items():
    np.testing.assert_array_equal(array, before[1][f"/ema/{path}"], err_msg=path)
  want = pipeline_lib.load_pipeline(str(tiny_pipeline)).params["unet"]
  jax.tree.map(np.testing.assert_array_equal, compared["base"], want)
  stored = (finished / "config.json").read_bytes()
  fewer = _arguments(tiny_pipeline, finished, **{"train.num_updates": 3})
  assert main.main(fewer) == 2
  assert (finished / "config.json").read_bytes() == stored


def test_what_a_run_began_with_must_stay(tiny_pipeline, tmp_path, capsys):
  copy = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
  fields = {"optim.schedule": "cosine", "train.num_updates": 1}
  arguments = _arguments(copy, tmp_path / "run", "sft", **fields)
  assert main.main(arguments) == 0
  longer = _arguments(copy, tmp_path / "run", "sft", **fields | {"train.num_updates": 2})
  assert main.main(longer) == 2
  assert "train.num_updates was 1, now 2: that would bend" in capsys.readouterr().err
  weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(weights)
  tensors["conv_in.bias"] += 1e-3
  save_file(tensors, weights)
  assert main.main(arguments) == 2
  assert "the base pipeline's weights are not those" in capsys.readouterr().err


def test_an_update_that_is_not_finite_changes_nothing(tiny_pipeline, tmp_path, capsys):
  workdir = tmp_path / "run"
  arguments = _arguments(
    tiny_pipeline, workdir, **{"loss.name": "benchmarks.sometimes_nan", "loss.margin": 0.05}
  )
  assert main.main(arguments) == 0
  lines = _lines(workdir)
  bad = [line["step"] for line in lines if line["loss"] is None]
  assert bad and len(bad) < 4
  assert [line["optim/skipped"] for line in lines] == [
    sum(step <= line["step"] for step in bad) for line in lines
  ]
  assert f"update {bad[0]} changed nothing: its loss is nan" in capsys.readouterr().err
  assert all(np.isfinite(leaf).all() for leaf in _parameters(workdir)[1].values())
  good = next(line for line in lines if line["loss"] is not None)
  if good["step"] == good["optim/skipped"] + 1:  # all before it were bad: still the reference
    assert good["loss"] == pytest.approx(0.05, rel=1e-3)
  # With fewer allowed the run ends there, and leaves the rows.
  workdir = tmp_path / "strict"
  strict = [*arguments, f"--workdir={workdir}", "--config.train.max_skipped=0"]
  assert main.main(strict) == 3
  rows = load_file(workdir / "diverged" / "batch.safetensors")
  described = json.loads((workdir / "diverged" / "batch.json").read_text())
  assert described["update"] == bad[0] and len(described["captions"]) == 8
  assert rows["latents"].shape[0] == rows["cond.text"].shape[0] == 8


def test_the_best_checkpoint_stays(tiny_pipeline, tmp_path, capsys):
  workdir = tmp_path / "run"
  fields = {"train.num_updates": 6, "train.keep": 1, "evaluate.every": 1, "optim.lr": 3e-3}
  arguments = _arguments(tiny_pipeline, workdir, "sft", **fields)
  arguments.append("--config.evaluate.scorers=('shapes.quality',)")
  assert main.main(arguments) == 0
  means = {}
  for update in (2, 4, 6):
    text = (workdir / "evaluation" / str(update) / "results.json").read_text()
    means[update] = json.loads(text)["shapes.quality-1"]["tuned"]["mean"]
  best = max(means, key=lambda update: (means[update], -update))
  noted = {"update": best, "scorer": "shapes.quality-1", "mean": means[best]}
  assert json.loads((workdir / "best.json").read_text()) == noted
  kept = max((2, 4), key=lambda update: (means[update], -update))  # when the last was saved
  assert checkpoint.steps(workdir / "checkpoints") == [kept, 6]
  assert f"update {best} by shapes.quality-1" in (workdir / "report.html").read_text()
  digest = tuned.load(str(workdir), step="best").digest
  assert digest == tuned.load(str(workdir), step=best).digest
  # Started again without one of them, it makes that evaluation before it goes on.
  before = _parameters(workdir)[1]
  shutil.rmtree(workdir / "checkpoints" / "6")
  (workdir / "evaluation" / str(kept) / "results.json").unlink()
  capsys.readouterr()
  assert main.main(arguments) == 0
  for path, array in _parameters(workdir)[1].items():
    np.testing.assert_array_equal(before[path], array, err_msg=path)
  assert json.loads((workdir / "best.json").read_text()) == noted
  # Evaluations of other prompts do not compare with these.
  assert main.main([*arguments, "--config.evaluate.num_prompts=4"]) == 0
  assert json.loads((workdir / "best.json").read_text())["update"] == 6


def test_what_diverges_is_not_saved(tiny_pipeline, tmp_path, capsys):
  arguments = _arguments(tiny_pipeline, tmp_path / "run", "sft", **{"optim.lr": 1e30})
  assert main.main(arguments) == 3
  assert "the run has diverged" in capsys.readouterr().err
  assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_no_updates_leave_the_base(tiny_pipeline, tmp_path, capsys):
  arguments = _arguments(tiny_pipeline, tmp_path / "none", **{"train.num_updates": 0})
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
  assert main.main(_arguments(tiny_pipeline, tmp_path / "run", **fields)) == 0
  printed = capsys.readouterr().err
  assert "1 file cannot be used: broken.jpg (not an image)" in printed
  assert "not scored with shapes.correct, shapes.quality" in printed
  html = (tmp_path / "run" / "report.html").read_text()
  assert any(text in html for text in photographs.values())
  images = tmp_path / "run" / "evaluation" / "4" / "images" / "tuned"
  assert len(list(images.iterdir())) == 4


REFUSALS = {
  "unknown field": (["--config.optim.learning_rate=1"], "did you mean 'optim.lr'"),
  "ill-typed field": (["--config.optim.lr=fast"], "'optim.lr' takes a float"),
  "negative steps": (["--config.train.num_updates=-5"], "'train.num_updates' must be"),
  "missing weights": (["--config.model.path=/nowhere"], "there is no directory /nowhere"),
  "odd batch": (["--config.train.accumulate=3"], "does not divide by 3"),
  "lacking parameter": (["--config.loss.name=dro"], "needs 'loss.margin'"),
  "too many steps": (["--config.evaluate.num_steps=2000"], "between 1 and 1000"),
  "huge seed": (["--config.seed=99999999999999999999"], "'seed' must be"),
  "unknown loss": (["--config.loss.name=dor"], "no loss 'dor'"),
  "unknown schedule": (["--config.optim.schedule=up"], "'optim.schedule' must be one of"),
  "unknown solver": (["--config.rollout.solver=euler"], "solver"),
  "a path that is not read": (["--config.data.path=/no"], "did you mean data.source=folder"),
  "unknown source": (["--config.data.source=fodler"], "did you mean 'folder'"),
  "missing folder": (["--config.data.source=folder", "--config.data.path=/no"], "/no"),
  "too many experts": (["--config.data.num_experts=100000"], "experts"),
  "unknown scorer": (["--config.evaluate.scorers=('shapes.nice',)"], "shapes.nice"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_one_line_and_writes_nothing(case, tiny_pipeline, tmp_path, capsys):
  extra, message = REFUSALS[case]
  workdir = tmp_path / "run"
  method = "sft" if case == "lacking parameter" else "dro"
  assert main.main([*_arguments(tiny_pipeline, workdir, method), *extra]) == 2
  printed = capsys.readouterr().err.splitlines()
  errors = [line for line in printed if line.startswith("jaxpref: error: ")]
  assert len(errors) == 1 and message in errors[0]
  assert printed[-1] == errors[0]
  assert not workdir.exists()


def test_the_workdir_of_another_run_is_refused(finished, tiny_pipeline, capsys):
  before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  assert main.main([*_arguments(tiny_pipeline, finished), "--config.optim.lr=0.1"]) == 2
  assert "holds another run: optim.lr was 0.0003, now 0.1" in capsys.readouterr().err
  after = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
  assert {p: t for p, t in after.items() if p.name != ".lock"} == {
    p: t for p, t in before.items() if p.name != ".lock"
  }


def test_a_workdir_that_cannot_be_written(tiny_pipeline, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert main.main(_arguments(tiny_pipeline, tmp_path / "file" / "run")) == 2
  assert "jaxpref: error: cannot write" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tiny_pipeline, tmp_path, capsys, monkeypatch):
  workdir = tmp_path / "run"
  save = checkpoint.save

  def fail_late(ckptr, step, *rest):
    if step > 2:
      full = types.SimpleNamespace(free=0)
      monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: full)
    return save(ckptr, step, *rest)

  monkeypatch.setattr(checkpoint, "save", fail_late)
  assert main.main(_arguments(tiny_pipeline, workdir)) == 2
  assert "no space left" in capsys.readouterr().err
  assert checkpoint.steps(workdir / "checkpoints") == [2]
