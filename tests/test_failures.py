"""Runs that are refused, stopped, or go wrong: what they say and what is left."""

import dataclasses
import json
import signal
import time
import types

import jax
import numpy as np
import pytest
import runs
from conftest import ROOT, start_cluster
from safetensors.numpy import load_file

from jaxpref import main, sharding
from jaxpref.data import encode, row_set
from jaxpref.data.rows import Row
from jaxpref.errors import UserError
from jaxpref.models import pipeline
from jaxpref.runtime import checkpoint, checkpoint_files


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tfds_dir):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


REFUSALS = {
  "kernels of a TPU": (["--config.model.attention=splash"], "needs a TPU, and this machine"),
  "unknown field": (["--config.optim.learning_rate=1"], "did you mean 'optim.lr'"),
  "ill-typed field": (["--config.optim.lr=fast"], "'optim.lr' takes a float"),
  "negative steps": (["--config.train.num_updates=-5"], "'train.num_updates' must be"),
  "missing weights": (
    ["--config.model.path=/nowhere"],
    "/nowhere is neither a directory nor a Hub id",
  ),
  "odd batch": (["--config.train.accumulate=3"], "must be a multiple of 3"),
  "lacking parameter": (
    ["--config.loss.name=dro"],
    "loss 'dro' needs loss.margin in its config file",
  ),
  "too many steps": (["--config.evaluate.num_steps=2000"], "between 1 and 1000"),
  "huge seed": (["--config.seed=99999999999999999999"], "'seed' must be"),
  "unknown loss": (["--config.loss.name=dor"], "unknown loss 'dor'"),
  "unknown schedule": (["--config.optim.schedule=up"], "'optim.schedule' must be one of"),
  "unknown solver": (["--config.rollout.solver=euler"], "solver"),
  "a path that is not read": (
    ["--config.data.path=/no"],
    "is not a built data set; name what its files are",
  ),
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
  assert main.main([*runs.arguments(tiny_pipeline, workdir, method), *extra]) == 2
  printed = capsys.readouterr().err.splitlines()
  errors = [line for line in printed if line.startswith("jaxpref: error: ")]
  assert len(errors) == 1 and message in errors[0]
  assert printed[-1] == errors[0]
  assert not workdir.exists()


def test_a_workdir_that_cannot_be_written(tiny_pipeline, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "file" / "run")) == 2
  assert "jaxpref: error: cannot write" in capsys.readouterr().err


@pytest.mark.long
def test_a_full_disk_leaves_the_last_checkpoint(tiny_pipeline, tmp_path, capsys, monkeypatch):
  workdir = tmp_path / "run"
  save = checkpoint.Checkpointer.save

  def fail_late(ckptr, step, *rest):
    if step > 2:
      full = types.SimpleNamespace(free=0)
      monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: full)
    return save(ckptr, step, *rest)

  monkeypatch.setattr(checkpoint.Checkpointer, "save", fail_late)
  assert main.main(runs.arguments(tiny_pipeline, workdir)) == 2
  assert "no space left" in capsys.readouterr().err
  assert checkpoint_files.steps(workdir / "checkpoints") == [2]


@pytest.mark.long
def test_sigterm_to_one_process_stops_all_after_a_save(tiny_pipeline, tmp_path):
  workdir, log = tmp_path / "run", tmp_path / "log"
  fields = {"train.num_updates": 100_000, "train.updates_per_iteration": 100_000}
  process = start_cluster(2, 1, runs.arguments(tiny_pipeline, workdir, **fields), log)
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (workdir / "metrics.jsonl").exists():
    time.sleep(0.05)
  # The script is told, and tells them.
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == 143, log.read_text()[-2000:]
  (step,) = checkpoint_files.steps(workdir / "checkpoints")
  said = f"asked to stop (SIGTERM), saved after update {step} of 100000; the same command"
  assert log.read_text().count(said) == 2, log.read_text()[-2000:]


@pytest.mark.long
def test_an_update_that_is_not_finite_changes_nothing(tiny_pipeline, tmp_path, capsys):
  workdir = tmp_path / "run"
  arguments = runs.arguments(
    tiny_pipeline, workdir, **{"loss.name": "benchmarks.sometimes_nan", "loss.margin": 0.05}
  )
  assert main.main(arguments) == 0
  lines = runs.lines(workdir)
  bad = [line["step"] for line in lines if line["loss"] is None]
  assert bad and len(bad) < 4
  assert [line["optim/skipped"] for line in lines] == [
    sum(step <= line["step"] for step in bad) for line in lines
  ]
  assert f"update {bad[0]} changed nothing: its loss is nan" in capsys.readouterr().err
  assert all(np.isfinite(leaf).all() for leaf in runs.parameters(workdir)[1].values())
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


@pytest.mark.long
def test_what_diverges_is_not_saved(tiny_pipeline, tmp_path, capsys):
  arguments = runs.arguments(tiny_pipeline, tmp_path / "run", "sft", **{"optim.lr": 1e9})
  assert main.main(arguments) == 3
  assert "the run has diverged" in capsys.readouterr().err
  assert checkpoint_files.steps(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(("part", "what"), [("vae", "images"), ("text_encoder", "caption")])
def test_rows_that_are_not_finite_are_named(tiny_pipeline, part, what):
  base = pipeline.load_pipeline(str(tiny_pipeline))
  broken = jax.tree.map(lambda x: np.full_like(x, np.nan), base.params[part])
  base = dataclasses.replace(base, params={**base.params, part: broken})
  rows = [Row((np.zeros((16, 16, 3), np.uint8),), "a ring")]
  with pytest.raises(UserError, match=rf"row 0 .*'a ring'.* {what} is not finite"):
    encode.encode_rows(base, sharding.make_mesh(), row_set.collect(rows), flip=False)
