import importlib.util
import io
import json
import math
import re
import sys
import time
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpref import main
from jaxpref.errors import UserError
from jaxpref.runtime import metrics as metrics_lib
from jaxpref.runtime import wandb_run, workdir
from jaxpref.training import iterate


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch, request):
  """TensorFlow takes seconds to import, so only its own test lets it."""
  if "tensorboard" not in request.node.name:
    monkeypatch.setattr(metrics_lib, "_open_tensorboard", lambda _: None)


def lines(workdir, *, times=True):
  text = (workdir / "metrics.jsonl").read_text()
  read = [json.loads(line) for line in text.splitlines()]
  return read if times else [{k: x[k] for k in x if k != "time"} for x in read]


def test_lines_are_json_at_once_and_finite_or_null(tmp_path):
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=3)
  before = time.time()
  writer.write(1, {"loss": np.float32(0.25), "rewards/margin": float("nan"), "n": 3})
  writer.write(2, {"loss": np.array(np.inf), "flag": True})
  (first, second) = lines(tmp_path)
  assert before - 0.01 <= first.pop("time") <= time.time() + 0.01
  assert first == {"step": 1, "loss": 0.25, "rewards/margin": None, "n": 3.0}
  assert second["loss"] is None
  assert second["flag"] == 1.0
  writer.close()


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
  def run(workdir, first, last, start_step):
    writer = metrics_lib.MetricWriter(workdir, total_updates=6, start_step=start_step)
    for step in range(first, last + 1):
      writer.write(step, {"loss": 1 / (step + 3)})
    writer.close()

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  whole.mkdir()
  cut.mkdir()
  run(whole, 0, 6, None)
  run(cut, 0, 5, None)
  with (cut / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "ti')
  # Killed while it wrote line 6, and the newest checkpoint is that of step 4.
  run(cut, 5, 6, 4)
  assert lines(cut, times=False) == lines(whole, times=False)
  # Killed before its first checkpoint: all starts again.
  run(cut, 0, 6, None)
  assert lines(cut, times=False) == lines(whole, times=False)


def test_a_full_line_that_was_altered_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match="line 2 is not a line of metrics"):
    metrics_lib.MetricWriter(tmp_path, total_updates=3, start_step=3)


def test_read_curves(tmp_path):
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=3)
  writer.write(1, {"loss": 0.5})
  writer.write(2, {"loss": math.inf, "lr": 1e-4})
  writer.close()
  curves = metrics_lib.read_curves(tmp_path)
  assert curves.keys() == {"loss", "lr"}
  assert curves["lr"] == [(2, 1e-4)]
  assert curves["loss"][0] == (1, 0.5)
  assert math.isnan(curves["loss"][1][1])
  assert metrics_lib.read_curves(tmp_path / "nothing") == {}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=3)
  with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
    monkeypatch.setattr(writer, "_file", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device$"):
      writer.write(1, {"loss": 0.5})


def clock(monkeypatch, module_clock="monotonic"):
  now = types.SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(metrics_lib.time, module_clock, lambda: now.seconds)
  return now


def show(writer, step):
  writer.progress(step, loss=0.01234, images_per_second=41.23, shares={"rollout": 0.628})


def test_progress_without_a_terminal(tmp_path, monkeypatch, capsys):
  now = clock(monkeypatch)
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=400, line_seconds=10)
  for step in range(1, 401):
    show(writer, step)
    now.seconds += 1.5 if step < 400 else 0.0
  err = capsys.readouterr().err.splitlines()
  assert err[0] == (
    "update 1/400  loss 0.0123  41.2 img/s  rollout 63 %  ETA -"  # nothing measured yet
  )
  # Updates 1.5 s apart, so at least 10 s are 7 updates: 392 left of 1.5 s each.
  assert err[1] == "update 8/400  loss 0.0123  41.2 img/s  rollout 63 %  ETA 9:48"
  assert err[-1].startswith("update 400/400 ")
  assert err[-1].endswith("ETA 0:00")
  assert len(err) == 1 + 399 // 7


def test_progress_of_a_resumed_run_counts_only_its_own_updates(tmp_path, monkeypatch, capsys):
  now = clock(monkeypatch)
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=5000, start_step=1000)
  show(writer, 1001)
  now.seconds += 20.0
  show(writer, 1002)
  assert capsys.readouterr().err.rstrip().endswith("ETA 22:12:40")  # 3998 * 20 s


def test_progress_on_a_terminal_overwrites_its_line(tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  now = clock(monkeypatch)
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setenv("COLUMNS", "30")
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=3)
  for step in (1, 2, 3):
    show(writer, step)
    now.seconds += 1.0
  shown = terminal.getvalue().split("\r\x1b[K")[1:]
  assert [len(line.rstrip("\n")) for line in shown] == [29, 29, 29]
  assert [line.endswith("\n") for line in shown] == [False, False, True]


def test_stopwatch(monkeypatch):
  now = clock(monkeypatch, "perf_counter")
  watch = metrics_lib.Stopwatch()
  for _ in range(2):
    with watch("rollout"):
      now.seconds += 3.0
    with pytest.raises(KeyError), watch("update"):
      now.seconds += 1.0
      raise KeyError
  now.seconds += 2.0
  assert watch.elapsed() == 10.0
  assert watch.shares() == {"rollout": 0.6, "update": 0.2}
  watch.reset()
  now.seconds += 1.0
  assert watch.shares() == {}


@pytest.mark.parametrize("absent", ["tensorflow", "tensorboard"])
def test_without_tensorboard_there_is_one_info_line(tmp_path, monkeypatch, caplog, absent):
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == absent else object()
  )
  caplog.set_level("INFO", logger="jaxpref.runtime.metrics")
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=1)
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert [r.getMessage() for r in caplog.records] == [
    f"no TensorBoard events: {absent} is not installed"
  ]


def test_tensorboard_gets_the_scalars(tmp_path, monkeypatch):
  """A stand-in for TensorFlow sees what clu's writer would be given."""
  written, hidden = [], []

  class SummaryWriter:
    def __init__(self, logdir):
      written.append(logdir)

    def write_scalars(self, step, scalars):
      written.append((step, dict(scalars)))

    def flush(self):
      written.append("flush")

    def close(self):
      written.append("close")

  tensorflow = types.SimpleNamespace(
    config=types.SimpleNamespace(
      set_visible_devices=lambda devices, kind: hidden.append((devices, kind))
    )
  )
  writers = types.SimpleNamespace(SummaryWriter=SummaryWriter)
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
  monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
  monkeypatch.setitem(sys.modules, "clu", types.SimpleNamespace(metric_writers=writers))
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=1)
  writer.write(1, {"loss": 1.0, "bad": math.nan})
  writer.close()
  assert hidden == [([], "GPU")]
  assert written[0] == str(tmp_path / "tensorboard")
  assert written[1][0] == 1
  assert written[1][1]["loss"] == 1.0
  assert math.isnan(written[1][1]["bad"])
  assert written[2:] == ["flush", "close"]


def test_real_tensorboard_events(tmp_path):
  pytest.importorskip("tensorflow")
  events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=1)
  writer.write(3, {"rewards/margin": 0.5})
  writer.close()
  accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
  accumulator.Reload()
  (tensor,) = accumulator.Tensors("rewards/margin")
  assert tensor.step == 3
  assert re.search("float_val: 0.5", str(tensor.tensor_proto)) or (
    np.frombuffer(tensor.tensor_proto.tensor_content, np.float32) == 0.5
  )


def _wandb(monkeypatch, *, broken=()):
  """Puts a stand-in for wandb in place; returns what it was called with."""
  calls = []

  def call(name):
    def called(*arguments, **named):
      calls.append((name, arguments, named))
      if name in broken:
        raise ConnectionError("the service\ncannot be reached")
      return types.SimpleNamespace(log=call("log"), finish=call("finish"))

    return called

  module = types.SimpleNamespace(init=call("init"), Settings=lambda **named: named)
  monkeypatch.setitem(sys.modules, "wandb", module)
  return calls


def _wandb_config(project="shapes"):
  config = ConfigDict({"name": "dpo", "train": {"wandb": project, "betas": (0.9, 0.99)}})
  return config.lock()


def test_wandb_gets_the_finite_scalars_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
  calls = _wandb(monkeypatch)
  for start, project in ((None, "shapes"), (1, "shapes"), (1, "other")):
    run = wandb_run.WandbRun(_wandb_config(project), tmp_path)
    writer = metrics_lib.MetricWriter(tmp_path, total_updates=2, start_step=start, wandb=run)
    writer.write(2, {"loss": np.float32(0.5), "bad": math.nan, "worse": -math.inf})
    writer.close()
  assert [name for name, _, _ in calls] == ["init", "log", "finish"] * 3
  first, second, other = (named for name, _, named in calls if name == "init")
  assert first["project"] == "shapes" and first["resume"] == "allow"
  assert first["config"] == {"name": "dpo", "train": {"wandb": "shapes", "betas": (0.9, 0.99)}}
  assert first["id"] == second["id"] != other["id"] and len(first["id"]) == 16
  assert calls[1][1:] == (({"loss": 0.5},), {"step": 2})
  assert lines(tmp_path)[-1]["bad"] is None


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_warns_once_and_changes_nothing(tmp_path, monkeypatch, caplog, broken):
  calls = _wandb(monkeypatch, broken=[broken])
  run = wandb_run.WandbRun(_wandb_config(), tmp_path)
  writer = metrics_lib.MetricWriter(tmp_path, total_updates=2, wandb=run)
  for step in (1, 2):
    writer.write(step, {"loss": 1.0})
  writer.close()
  assert [name for name, _, _ in calls].count(broken) == 1
  assert [r.getMessage() for r in caplog.records] == [
    "no metrics to Weights & Biases from here on: the service cannot be reached"
  ]
  assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_run_without_the_package_wandb_is_refused_before_it_begins(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, "wandb", None)
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
  )
  workdir = tmp_path / "run"
  arguments = ["--config=dpo:tiny", f"--workdir={workdir}", "--config.train.wandb=mine"]
  assert main.main(arguments) == 2
  err = capsys.readouterr().err
  assert "train.wandb is 'mine'" in err and "pip install 'jaxpref[wandb]'" in err
  assert not workdir.exists()


def test_the_project_in_wandb_may_change_on_resume():
  assert "train.wandb" in workdir.RESUME_SAFE and "train.wandb" in iterate.RESUME_SAFE
