import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxpref import base_config
from jaxpref.errors import UserError
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import run_state

ROOT = Path(workdir_lib.__file__).parents[2]


def make_config(**changes):
  config = ConfigDict(
    {
      "name": "dro",
      "preset": "shapes",
      "optim": {"lr": 1e-4, "b1": 0.9},
      "train": {"num_updates": 10, "log_every": 1, "batch_size": 4},
      "evaluate": {"seed": 0},
      "data": {"sizes": (1, 2)},
    }
  )
  config.update_from_flattened_dict(changes)
  return config


def fails(path, config):
  with pytest.raises(UserError) as caught:
    workdir_lib.open_workdir(path, config)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_default_workdir():
  assert workdir_lib.default_workdir(make_config()) == Path("runs/dro-shapes")


def test_new_empty_and_resumed(tmp_path):
  path = tmp_path / "runs" / "dro"
  first = workdir_lib.open_workdir(path, make_config())
  assert (first.path, first.resumed) == (path, False)
  assert json.loads((path / "config.json").read_text())["optim"] == {
    "b1": 0.9,
    "lr": 1e-4,
  }
  workdir_lib.release(first)
  assert sorted(p.name for p in path.iterdir()) == [".lock", "config.json"]

  changed = make_config(**{"train.num_updates": 20, "evaluate.seed": 7})
  second = workdir_lib.open_workdir(path, changed)
  assert second.resumed
  # Until the caller has accepted the change, nothing is written.
  assert json.loads((path / "config.json").read_text())["train"]["num_updates"] == 10
  workdir_lib.write_config(path, changed)
  assert json.loads((path / "config.json").read_text())["train"]["num_updates"] == 20
  workdir_lib.release(second)

  empty = tmp_path / "empty"
  empty.mkdir()
  assert not workdir_lib.open_workdir(empty, make_config()).resumed


def test_another_run_is_refused_and_nothing_is_written(tmp_path):
  workdir_lib.release(workdir_lib.open_workdir(tmp_path, make_config()))
  before = (tmp_path / "config.json").read_bytes()
  changes = {"optim.lr": 1e-3, "train.batch_size": 8, "train.num_updates": 99}
  message = fails(tmp_path, make_config(**changes))
  assert message == (
    f"{tmp_path} holds another run: optim.lr was 0.0001, now 0.001 (and 1 more): "
    "choose another --workdir"
  )
  added = make_config()
  added.evaluation = ConfigDict({"x": 1})  # 'evaluate' does not cover 'evaluation'
  assert "evaluation.x was absent, now 1:" in fails(tmp_path, added)
  assert (tmp_path / "config.json").read_bytes() == before
  # The lock was given back by the refusals.
  assert workdir_lib.open_workdir(tmp_path, make_config()).resumed


def test_a_field_that_is_newer_than_the_run_may_have_its_default(tmp_path):
  config = base_config.base("dro", "tiny")
  workdir_lib.release(workdir_lib.open_workdir(tmp_path, config))
  older = json.loads((tmp_path / "config.json").read_text())
  del older["data"]["crop"]
  (tmp_path / "config.json").write_text(json.dumps(older))
  workdir_lib.release(workdir_lib.open_workdir(tmp_path, config))
  (tmp_path / "config.json").write_text(json.dumps(older))
  config.data.crop = "none"
  assert "data.crop was center, now none" in fails(tmp_path, config)


def test_inputs_may_be_named_by_another_path(tmp_path):
  # Their contents decide: training compares digests.
  names = ("data.path", "model.path", "model.start")
  fields = {"data": {"path": "a"}, "model": {"path": "b", "start": ""}}
  config, moved = make_config(), make_config()
  for of, places in (
    (config, fields),
    (moved, {"data": {"path": "x"}, "model": {"path": "y"}}),
  ):
    with of.unlocked():
      of.update(places)
  with moved.unlocked():
    moved.model.start = "z"
    moved.data.split = "train"  # a field that an older version did not have
  workdir_lib.release(workdir_lib.open_workdir(tmp_path, config))
  assert workdir_lib.open_workdir(tmp_path, moved).resumed
  assert set(names) < set(workdir_lib.RESUME_SAFE)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("data", r"training images \(in/x\)"),
    ("pipeline", r"base pipeline's weights \(base/y\)"),
    ("start", r"weights in model.start \(other/z\)"),
  ],
)
def test_other_contents_are_refused_by_name(name, message):
  same = {"data": "1", "pipeline": "2", "start": "3", "num_updates": 4}
  places = {"data": {"path": "in/x"}, "model": {"path": "base/y", "start": "other/z"}}
  config = ConfigDict({**places, "optim": {"schedule": "constant"}})
  run_state.check_resumes(same, same, 2, config)
  with pytest.raises(UserError, match=f"the {message} have changed since this workdir's run"):
    run_state.check_resumes(same, same | {name: "other"}, 2, config)


def test_foreign_directories_are_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  message = fails(tmp_path, make_config())
  assert message == (
    f"{tmp_path} is not empty (thesis.tex) and has no config.json: choose another --workdir"
  )
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_config_json_is_refused(tmp_path):
  for text in ("{", "[]"):
    (tmp_path / "config.json").write_text(text)
    assert "config.json cannot be read" in fails(tmp_path, make_config())
    assert (tmp_path / "config.json").read_text() == text


def test_places_that_cannot_be_written(tmp_path):
  file = tmp_path / "file"
  file.write_text("x")
  assert fails(file, make_config()) == f"{file} is a file, not a directory"
  below = file / "run"
  assert fails(below, make_config()) == f"cannot write to {below}: Not a directory"
  assert fails("/proc/run", make_config()).startswith("cannot write to /proc/run: ")
  assert fails("/proc/self", make_config()).startswith("cannot write to /proc/self: ")
  assert "not a local path" in fails("gs://bucket/run", make_config())


def test_permission_denied_is_one_line(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(workdir_lib.tempfile, "NamedTemporaryFile", refuse)
  assert fails(tmp_path, make_config()) == (f"cannot write to {tmp_path}: Permission denied")


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
  code = (
    "import sys\n"
    "from ml_collections import ConfigDict\n"
    "from jaxpref.runtime import workdir\n"
    "workdir.open_workdir(sys.argv[1], ConfigDict({'name': 'dro'}))\n"
    "print('locked', flush=True)\n"
    "sys.stdin.read()\n"
  )
  config = ConfigDict({"name": "dro"})
  with subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout.readline() == "locked\n"
    message = fails(tmp_path, config)
    assert message.startswith(f"{tmp_path} is in use by process {child.pid} on ")
    child.send_signal(signal.SIGKILL)
  assert workdir_lib.open_workdir(tmp_path, config).resumed


def test_file_systems_without_locks_get_a_warning(tmp_path, monkeypatch, caplog):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", unsupported)
  assert not workdir_lib.open_workdir(tmp_path, make_config()).resumed
  assert "without file locks" in caplog.text


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  workdir_lib.write_json(path, {"a": [1, None]})
  assert json.loads(path.read_text()) == {"a": [1, None]}

  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(UserError, match=r"results.json: No space left on device"):
    workdir_lib.write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": [1, None]}
  assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
