"""Checkpoints in a bucket, by an emulator of Google Cloud Storage on this machine."""

import http.server
import json
import socket
import sys
import types

import jax
import numpy as np
import pytest
import runs
from conftest import ROOT

from jaxpref import config as config_lib
from jaxpref import main
from jaxpref.errors import TransientError, UserError
from jaxpref.runtime import checkpoint, checkpoint_files, storage
from jaxpref.training import load_run

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def emulator():
  """Its bucket's address; what asks for Google's is sent there."""
  from gcp_storage_emulator import server as emulator_lib

  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  address = f"http://localhost:{port}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs's
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for credentials
    # Else a connection that is only kept open keeps all others waiting.
    threads = types.SimpleNamespace(HTTPServer=http.server.ThreadingHTTPServer)
    patch.setattr(emulator_lib, "server", threads)
    server = emulator_lib.create_server(
      "localhost", port, in_memory=True, default_bucket="bucket"
    )
    server.start()
    yield "gs://bucket"
    server.stop()


def make_state(seed):
  return {"a": jax.random.normal(jax.random.key(seed), (200, 3)), "n": jax.numpy.int32(seed)}


def restore(ckptr):
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), make_state(0)
  )
  return ckptr.restore(abstract)


def saved(directory, steps, **options):
  ckptr = checkpoint.Checkpointer(directory, **{"keep": 2, **options})
  for step in steps:
    ckptr.save(step, make_state(step), {"at": step}, {"about": "it"})
  ckptr.wait()
  return ckptr


def test_saves_keeps_restores(emulator):
  directory = f"{emulator}/keeps"
  ckptr = saved(directory, (1, 2, 3))
  assert checkpoint_files.steps(directory) == [2, 3] and ckptr.latest_step() == 3
  found = restore(ckptr)
  assert (found.step, found.data_state, found.metadata) == (3, {"at": 3}, {"about": "it"})
  np.testing.assert_array_equal(found.state["a"], make_state(3)["a"])
  with pytest.raises(ValueError, match="already saved"):
    ckptr.save(3, make_state(3), {}, {})
  # Of part of it, by someone else.
  assert checkpoint_files.find_good(directory).step == 3
  abstract = {"a": jax.ShapeDtypeStruct((200, 3), np.float32, sharding=SHARDING)}
  part = checkpoint_files.restore_subtree(directory, 2, abstract)
  np.testing.assert_array_equal(part["a"], make_state(2)["a"])


def alter(path):
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.long
def test_damaged_ones_are_set_aside(emulator, caplog):
  directory = f"{emulator}/damaged"
  ckptr = saved(directory, (1, 2, 3, 4), keep=4)
  root = storage.place(directory)
  damages = {
    2: (alter, "is altered"),
    3: (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes"),
    4: (lambda path: path.unlink(), "is missing"),
  }
  for step, (damage, _) in damages.items():
    path = root / str(step)
    damage(path / next(n for n in storage.files(path) if n.startswith("state/d/")))
  assert restore(ckptr).step == 1
  for step, (_, said) in damages.items():
    warned = next(m for m in caplog.messages if f"of step {step} " in m)
    assert said in warned and "state/d/" in warned
    aside = root / f"{step}.damaged"
    assert (aside / checkpoint_files.CHECKSUMS).exists() and not (aside / storage.MARK).exists()
  assert checkpoint_files.steps(directory) == [1]
  # Their steps can be saved again.
  ckptr.save(2, make_state(2), {}, {})
  ckptr.wait()
  assert checkpoint_files.steps(directory) == [1, 2]


def test_what_a_killed_save_left_is_no_checkpoint(emulator):
  directory = f"{emulator}/killed"
  saved(directory, (1, 2))
  root = storage.place(directory)
  (root / "2" / storage.MARK).unlink()
  assert checkpoint_files.steps(directory) == [1]
  with pytest.raises(UserError, match=r"the steps are \[1\]"):
    checkpoint_files.find_good(directory, step=2)
  ckptr = checkpoint.Checkpointer(directory, keep=2)
  assert not (root / "2").exists()
  assert restore(ckptr).step == 1


@pytest.mark.long
def test_a_bucket_that_does_not_answer_is_one_line(emulator, monkeypatch):
  with pytest.raises(TransientError, match="gs://nowhere/run cannot be reached: "):
    checkpoint.Checkpointer("gs://nowhere/run", keep=1, owner=runs_config())
  ckptr = saved(f"{emulator}/gone", (1,))

  def fail(*_, **__):
    raise RuntimeError("503")

  monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", fail)
  with pytest.raises(TransientError, match="503 in gs://.*: step 2 was not written"):
    ckptr.save(2, make_state(2), {}, {})
  assert checkpoint_files.steps(ckptr.directory) == [1]


def test_what_is_another_runs_stays(emulator):
  """A directory of directories of checkpoints, as an iterative run has them."""
  saved(f"{emulator}/others/1", (1,))
  unmarked = storage.place(f"{emulator}/others/2/notes.txt")
  unmarked.write_text("mine")
  before = storage.files(storage.place(f"{emulator}/others"))
  with pytest.raises(UserError, match="is not empty and has no config.json"):
    checkpoint.Checkpointer(f"{emulator}/others", keep=1, owner=runs_config())
  assert storage.files(storage.place(f"{emulator}/others")) == before


@pytest.mark.parametrize("error", [ValueError("UNAVAILABLE: no answer"), RuntimeError("503")])
def test_no_answer_is_not_damage(emulator, error, monkeypatch):
  ckptr = saved(f"{emulator}/silent", [2] if isinstance(error, ValueError) else [])

  def fail(*_, **__):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    with pytest.raises(TransientError, match="cannot be reached"):
      restore(ckptr)
    with pytest.raises(TransientError, match="cannot be reached"):
      checkpoint_files.restore_subtree(ckptr.directory, 2, {})
  assert checkpoint_files.steps(ckptr.directory) == [2]


def runs_config():
  return config_lib.load_config("dro:tiny")


@pytest.mark.parametrize(
  ("where", "said"),
  [
    ("s3://bucket/run", "neither a local path nor gs://"),
    ("gs:///run", "neither a local path nor gs://"),
    ("runs/elsewhere", "must be an absolute path"),
  ],
)
def test_other_places_are_refused(where, said, tiny_pipeline, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  fields = {"train.checkpoints": where}
  assert main.main(runs.arguments(tiny_pipeline, tmp_path / "run", **fields)) == 2
  assert said in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_without_gcsfs_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(UserError, match=r"pip install 'jaxpref\[gcs\]'"):
    storage.place("gs://bucket/run")


@pytest.mark.long
def test_a_run_goes_on_from_a_bucket(
  emulator, tiny_pipeline, tmp_path, capsys, monkeypatch, tfds_dir
):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  there = f"{emulator}/runs/sft"
  whole = tmp_path / "whole"
  assert main.main(runs.arguments(tiny_pipeline, whole, "sft")) == 0
  fields = {"train.checkpoints": there, "optim.lr": 2e-4}
  arguments = runs.arguments(tiny_pipeline, tmp_path / "first", "sft", **fields)
  del arguments[-1]
  assert main.main([*arguments, "--config.train.num_updates=2"]) == 0
  assert not (tmp_path / "first" / "checkpoints").exists()
  assert checkpoint_files.steps(there) == [2]
  # Also where the workdir was lost; but not with another configuration.
  second, third = (
    runs.arguments(tiny_pipeline, tmp_path / name, "sft", **fields)
    for name in ("second", "third")
  )
  capsys.readouterr()
  assert main.main(third) == 2
  assert "holds another run: optim.lr was" in capsys.readouterr().err
  assert main.main(second[:-1]) == 0
  expected, found = (
    load_run.load(str(directory)).digest for directory in (whole, tmp_path / "second")
  )
  assert expected == found
  config = json.loads(storage.place(f"{there}/config.json").read_text())
  assert config["train"]["num_updates"] == 2  # as it began
