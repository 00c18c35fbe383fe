"""Processes agreeing, and what watches over a run, each without a cluster.

Whole runs of several processes are in test_train and test_iterate.
"""

import errno
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from jax.experimental import multihost_utils

from jaxpref import main, sharding
from jaxpref.data import encode
from jaxpref.errors import DivergedError, StoppedError, UserError
from jaxpref.runtime import checkpoint, distributed, watchdog, workdir
from jaxpref.training import anomalies


@pytest.fixture
def other(monkeypatch):
  """Process 0 of two; what the other one would say is given by the test."""
  said = [{"value": None}]

  def gather(array):
    # The lengths first, then the texts padded to the longest.
    text = np.frombuffer(json.dumps(said[0]).encode(), np.uint8)
    array = np.asarray(array)
    if array.ndim == 0:
      return np.stack([array, np.int32(len(text))])
    theirs = np.zeros_like(array)
    theirs[: len(text)] = text
    return np.stack([array, theirs])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  return said


def test_what_the_first_finds_all_know(other, monkeypatch):
  assert distributed.first(lambda: [1, "two"]) == [1, "two"]
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(
    distributed, "_exchange", lambda job: [{"told": True}] if job is None else None
  )
  assert distributed.first(lambda: pytest.fail("not on this process")) == {"told": True}


def test_an_error_of_one_is_everyones(other):
  other[0] = {"error": "no such file", "status": 3}
  with pytest.raises(UserError, match=r"no such file \(process 1\)") as error:
    distributed.together(lambda: "fine here")
  assert error.value.status == 3
  other[0] = {"value": None}
  with pytest.raises(DivergedError, match="here"):
    distributed.together(_raise)


def _raise():
  raise DivergedError("here")


def test_together_returns_what_is_here(other):
  value = object()
  assert distributed.together(lambda: value) is value


def test_processes_must_have_the_same(other):
  mine = {"name": "'dro'", "optim.lr": "0.1"}
  other[0] = {"value": mine}
  distributed.check_same("configurations", mine)
  different = "processes 0 and 1 have different configurations: optim.lr is "
  for lr in ("'" * 300, "0.2"):
    with pytest.raises(UserError, match=f"{different}{lr} and 0.1"):
      distributed.check_same("configurations", mine | {"optim.lr": lr})
  with pytest.raises(UserError, match=f"{different}absent and 0.1"):
    distributed.check_same("configurations", {"name": "'dro'"})


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    ({"num_processes": "2"}, "needs --coordinator"),
    ({"coordinator": "auto", "process_id": "1"}, "needs --coordinator"),
    ({"coordinator": "a:1"}, "needs --num_processes"),
    ({"coordinator": "a:1", "num_processes": "x", "process_id": "0"}, "needs --num_processes"),
    ({"coordinator": "a:1", "num_processes": "2", "process_id": "2"}, "must be less than"),
    ({"coordinator": "a:1", "num_processes": "9" * 5000, "process_id": "0"}, "needs --num"),
    ({"coordinator": "a", "num_processes": "2", "process_id": "0"}, "not HOST:PORT"),
    ({"coordinator": ":1", "num_processes": "2", "process_id": "0"}, "not HOST:PORT"),
    ({"coordinator": "a:70000", "num_processes": "2", "process_id": "0"}, "not HOST:PORT"),
  ],
)
def test_flags_that_cannot_be(flags, text):
  with pytest.raises(UserError, match=text):
    distributed.initialize(flags)


def test_launchers_are_noticed(monkeypatch):
  for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(name, raising=False)
  assert distributed._settings({}) is None
  monkeypatch.setenv("SLURM_NTASKS", "4")
  assert distributed._settings({}) is None  # a batch script's own process
  monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
  assert distributed._settings({}) == {}
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert distributed._settings({}) is None


def test_nobody_to_meet(capsys, monkeypatch):
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **_: (_ for _ in ()).throw(RuntimeError("late\nx"))
  )
  arguments = ["--config=configs/dro.py:tiny", "--coordinator=auto"]
  monkeypatch.chdir(ROOT)
  assert main.main(arguments) == 75  # a launcher tries again
  assert "the processes of this run did not meet: late\n" in capsys.readouterr().err


def test_a_workdir_must_be_the_same_for_all(other, tmp_path, monkeypatch):
  monkeypatch.setattr(distributed, "_SHARED_SECONDS", 0.1)
  (tmp_path / ".shared").write_text("another run's")
  with pytest.raises(UserError, match="is not the same directory for all"):
    distributed._check_shared(tmp_path, "ours")
  (tmp_path / ".shared").write_text("ours")
  distributed._check_shared(tmp_path, "ours")


def test_outside_of_a_cluster_there_is_nothing_to_find(capsys, monkeypatch):
  error = ValueError("coordinator_address should be defined.")
  monkeypatch.setattr(jax.distributed, "initialize", lambda **_: (_ for _ in ()).throw(error))
  with pytest.raises(UserError, match="this is not a TPU pod and was not started by SLURM"):
    distributed.initialize({"coordinator": "auto"})


def test_sigterm_is_noticed_at_a_beat():
  before = signal.getsignal(signal.SIGTERM)
  with watchdog.watching(hang_minutes=0):
    assert not watchdog.beat()
    os.kill(os.getpid(), signal.SIGTERM)
    assert watchdog.beat()
    with pytest.raises(StoppedError, match="the same command resumes") as error:
      watchdog.beat_or_stop()
  assert error.value.status == 143
  assert signal.getsignal(signal.SIGTERM) is before


def test_encoding_can_be_stopped():
  mesh = sharding.make_mesh()
  rows = {"x": np.arange(4.0)}
  run = jax.jit(lambda _, rows: rows)
  with watchdog.watching(hang_minutes=0):
    assert encode.in_batches(run, {}, rows, 2, mesh)["x"].tolist() == [0, 1, 2, 3]
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StoppedError):
      encode.in_batches(run, {}, rows, 2, mesh)
  encode.in_batches(run, {}, rows, 2, mesh)  # another run's


def test_a_storage_that_is_gone_may_come_back(tmp_path, monkeypatch):
  for number, status in ((errno.ENOSPC, 2), (errno.EROFS, 2), (errno.ESTALE, 75)):
    error = OSError(number, os.strerror(number))
    monkeypatch.setattr(workdir.os, "fsync", lambda _, e=error: (_ for _ in ()).throw(e))
    with pytest.raises(UserError, match=os.strerror(number)) as raised:
      workdir.write_text(tmp_path / "file", "text")
    assert raised.value.status == status
    with pytest.raises(UserError, match="step 5 was not written") as raised:
      checkpoint.Checkpointer(tmp_path, keep=1)._raise_failure(5, error)
    assert raised.value.status == status
    theirs = ValueError(f"Error writing: {os.strerror(number)} [os_error_code='{number}']")
    with pytest.raises(UserError, match="step 5 was not written") as raised:
      checkpoint.Checkpointer(tmp_path, keep=1)._raise_failure(5, theirs)
    assert raised.value.status == status


def test_a_run_that_hangs_ends_and_says_where():
  program = """
import time
from jaxpref.runtime import watchdog
def standing_still():
  time.sleep(60)
with watchdog.watching(hang_minutes=0.005):
  watchdog.beat()
  standing_still()
"""
  done = subprocess.run(
    [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=50
  )
  assert done.returncode == 1 and "standing_still" in done.stderr


def test_spikes_are_said_once_there_is_something_to_compare_with(caplog):
  spikes = anomalies.Spikes()
  rng = np.random.default_rng(0)
  for done in range(30):
    spikes.add(done, {"loss": 1.0 + 0.1 * rng.standard_normal()})
  spikes.add(30, {"loss": float("nan")})
  spikes.add(31, {"loss": 2.0})  # many spreads, but not that high
  assert not caplog.records
  spikes.add(32, {"loss": 9.0})
  assert "loss is 9 at update 32" in caplog.text
