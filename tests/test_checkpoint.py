import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import xla_flags

from jaxpref.errors import UserError
from jaxpref.runtime import checkpoint, checkpoint_files

ROOT = Path(checkpoint.__file__).parents[2]
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt: optax.OptState
  ema: dict
  key: jax.Array


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4)), jnp.float32)},
    "scale": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
  }
  opt = optax.adam(1e-3).init(params)
  ema = jax.tree.map(lambda x: x + 1, params)
  return State(jnp.int32(seed), params, opt, ema, jax.random.key(seed))


def abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), state
  )


def same(a, b):
  """Structure, dtypes and bits."""

  def bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return str(x.dtype), x.shape, np.asarray(x).tobytes()

  kinds = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (a, b)]
  bits_a, bits_b = jax.tree.map(bits, a), jax.tree.map(bits, b)
  return kinds[0] == kinds[1] and bits_a == bits_b


def save_all(directory, *steps, keep=3):
  ckptr = checkpoint.Checkpointer(directory, keep=keep)
  for step in steps:
    ckptr.save(step, make_state(step), {"next_index": step}, {"a": step})
  ckptr.wait()
  return ckptr


def largest(path):
  return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_bitwise(tmp_path):
  ckptr = save_all(tmp_path / "new" / "checkpoints", 1, 2)
  assert ckptr.latest_step() == 2
  restored = ckptr.restore(abstract(make_state()))
  step, state, data_state, metadata = restored
  assert (step, data_state, metadata) == (2, {"next_index": 2}, {"a": 2})
  assert same(state, make_state(2))
  assert not same(state, make_state(1))
  assert (state.params["scale"].dtype, state.step.dtype) == (jnp.bfloat16, jnp.int32)
  ckptr.close()


def test_only_the_newest_are_kept(tmp_path):
  ckptr = save_all(tmp_path, 1, 2, 3, keep=2)
  assert checkpoint_files.steps(tmp_path) == [2, 3]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
  with pytest.raises(ValueError, match="step 3 is already saved"):
    ckptr.save(3, make_state(), {}, {})
  with pytest.raises(ValueError, match="survive JSON"):
    ckptr.save(4, make_state(), {"n": (1, 2)}, {})


def test_what_cannot_be_removed_stays_and_harms_nothing(tmp_path, monkeypatch, caplog):
  def busy(path):
    raise OSError(f"{path} is busy")

  monkeypatch.setattr(checkpoint_files, "remove", busy)
  save_all(tmp_path, 1, 2, keep=1)
  assert checkpoint_files.steps(tmp_path) == [1, 2]
  assert "cannot remove the old checkpoint of step 1" in caplog.text


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
  ckptr = checkpoint.Checkpointer(tmp_path, keep=1)
  state = {"x": jax.jit(lambda: jnp.arange(1 << 20, dtype=jnp.float32))()}
  expected = np.arange(1 << 20, dtype=np.float32)
  update = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)
  ckptr.save(1, state, None, {})
  for _ in range(3):
    state = update(state)
  jax.block_until_ready(state)
  target = {"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32, sharding=SHARDING)}
  restored = ckptr.restore(target)
  np.testing.assert_array_equal(restored.state["x"], expected)
  np.testing.assert_array_equal(state["x"], -expected)


def test_the_position_of_grain_data_comes_back(tmp_path):
  def iterator():
    data = grain.MapDataset.range(100).seed(3).shuffle().repeat().batch(4)
    return iter(data.to_iter_dataset())

  batches = iterator()
  for _ in range(7):
    next(batches)
  ckptr = checkpoint.Checkpointer(tmp_path, keep=1)
  state = {"x": jnp.ones(2)}
  ckptr.save(7, state, batches.get_state(), {})
  expected = [next(batches) for _ in range(3)]
  again = iterator()
  again.set_state(ckptr.restore(abstract(state)).data_state)
  np.testing.assert_array_equal([next(again) for _ in range(3)], expected)


def flip_a_bit(path):
  file = largest(path)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


@pytest.mark.parametrize(
  ("damage", "named"),
  [
    (lambda path: os.truncate(largest(path), 10), "has 10 of "),
    (flip_a_bit, "is altered"),
    (lambda path: largest(path).unlink(), "is missing"),
    (lambda path: (path / "checksums.json").write_text("{"), "json is unreadable"),
  ],
)
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, caplog, damage, named):
  ckptr = save_all(tmp_path, 1, 2, 3)
  damage(tmp_path / "3")
  restored = ckptr.restore(abstract(make_state()))
  assert (restored.step, restored.data_state) == (2, {"next_index": 2})
  assert same(restored.state, make_state(2))
  (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("jaxpref")]
  assert warning.startswith(f"checkpoint of step 3 in {tmp_path} is damaged (")
  assert named in warning and warning.endswith("going back to step 2")
  # The run goes on: step 3 is saved again and is what the next restore finds.
  ckptr.save(3, make_state(33), {}, {})
  assert same(ckptr.restore(abstract(make_state())).state, make_state(33))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "3.damaged"]


def test_no_good_checkpoint_lists_what_was_found(tmp_path):
  ckptr = save_all(tmp_path, 1, 2)
  os.truncate(largest(tmp_path / "1"), 10)
  largest(tmp_path / "2").unlink()
  with pytest.raises(UserError) as caught:
    ckptr.restore(abstract(make_state()))
  message = str(caught.value)
  assert "\n" not in message
  assert message.startswith(f"no good checkpoint in {tmp_path} (step 2: state/")
  assert "is missing; step 1: state/" in message
  assert checkpoint_files.steps(tmp_path) == [1, 2]


def test_without_checksums_orbax_decides(tmp_path, caplog):
  """As after a kill between the end of the save and the checksums."""
  ckptr = save_all(tmp_path, 1, 2)
  (tmp_path / "2" / "checksums.json").unlink()
  restored = ckptr.restore(abstract(make_state()))
  assert same(restored.state, make_state(2))
  assert "step 2 restored, although it has no checksums" in caplog.text
  # From now on it has some, as whoever reads the run's model asks for.
  assert checkpoint_files.find_good(tmp_path).step == 2
  (tmp_path / "2" / "checksums.json").unlink()
  for path in [p for p in (tmp_path / "2").rglob("*") if p.parent.name == "d"]:
    path.unlink()
  assert ckptr.restore(abstract(make_state())).step == 1
  assert "step 2 in" in caplog.text
  assert (tmp_path / "2.damaged").is_dir()


def test_half_written_checkpoints_are_removed_and_not_found(tmp_path):
  save_all(tmp_path, 1).close()
  (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
  ckptr = checkpoint.Checkpointer(tmp_path, keep=1)
  assert ckptr.latest_step() is None
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(UserError, match=r"no good checkpoint in .* \(it is empty\)"):
    ckptr.restore(abstract(make_state()))


def test_another_structure_or_shape_is_not_taken_for_damage(tmp_path):
  ckptr = save_all(tmp_path, 1, 2)
  target = abstract(make_state())
  wider = {
    **target.params,
    "scale": jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=SHARDING),
  }
  for wrong in ({"x": target.key}, target.replace(params=wider)):
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/2 does not fit: ") as e:
      ckptr.restore(wrong)
    assert "\n" not in str(e.value)
  assert checkpoint_files.steps(tmp_path) == [1, 2]


def test_restore_subtree(tmp_path):
  save_all(tmp_path, 1, 2).close()
  target = {"ema": abstract(make_state().ema)}
  part = checkpoint_files.restore_subtree(tmp_path, 1, target)
  assert same(part, {"ema": make_state(1).ema})
  wider = jax.ShapeDtypeStruct((6,), jnp.bfloat16, sharding=SHARDING)
  wrong = {"ema": {**target["ema"], "scale": wider}}
  with pytest.raises(UserError, match=f"checkpoint {tmp_path}/1 does not fit: "):
    checkpoint_files.restore_subtree(tmp_path, 1, wrong)


def test_find_good(tmp_path, caplog):
  with pytest.raises(UserError, match="cannot find a checkpoint in"):
    checkpoint_files.find_good(tmp_path)
  save_all(tmp_path, 1, 2).close()
  assert checkpoint_files.find_good(tmp_path)[:2] == (2, {"a": 2})
  assert checkpoint_files.find_good(tmp_path, step=1)[:2] == (1, {"a": 1})
  with pytest.raises(UserError, match=r"checkpoint of step 9 in .*; the steps are \[1, 2\]"):
    checkpoint_files.find_good(tmp_path, step=9)
  os.truncate(largest(tmp_path / "2"), 10)
  with pytest.raises(UserError, match="step 2: state/.* has 10 of"):
    checkpoint_files.find_good(tmp_path, step=2)
  assert checkpoint_files.find_good(tmp_path)[0] == 1
  assert "skipped the checkpoint of step 2, which is damaged" in caplog.text
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]  # nothing renamed


def test_too_little_space_is_said_before_the_save(tmp_path, monkeypatch):
  ckptr = save_all(tmp_path, 1)
  usage = SimpleNamespace(free=500)
  monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
  with pytest.raises(UserError) as caught:
    ckptr.save(2, make_state(), {}, {})
  assert str(caught.value) == (
    f"no space left (0.0 MB needed, 0.0 MB free) in {tmp_path}: step 2 was not "
    "written, the checkpoint of step 1 is intact"
  )
  assert [p.name for p in tmp_path.iterdir()] == ["1"]


def run_python(code, *args, **env):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
  command = [sys.executable, "-c", code, *map(str, args)]
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


WRITE_ERROR = """
import resource, signal, sys, types
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxpref.runtime import checkpoint
from jaxpref.errors import UserError

directory = Path(sys.argv[1])
ckptr = checkpoint.Checkpointer(directory, keep=2)
noise = np.random.default_rng(0).normal(size=(2, 1 << 18))  # 1 MiB each as float32
state = {"x": jnp.asarray(noise[0], jnp.float32)}
ckptr.save(1, state, {}, {})
ckptr.wait()
if sys.argv[2] == "disk":
  filler = directory.parent / "filler"
  filler.write_bytes(bytes(checkpoint.shutil.disk_usage(directory).free - (1 << 19)))
  # Somebody else fills the disk between the check and the write.
  checkpoint.shutil.disk_usage = lambda _: types.SimpleNamespace(free=1e9)
else:
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
ckptr.save(2, {"x": jnp.asarray(noise[1], jnp.float32)}, {}, {})
try:
  ckptr.close()
except UserError as error:
  print(error)
print(sorted(path.name for path in directory.iterdir()))
again = checkpoint.Checkpointer(directory, keep=2)
restored = again.restore({"x": jax.ShapeDtypeStruct((1 << 18,), "float32")})
print(restored.step, bool((restored.state["x"] == state["x"]).all()))
"""


@pytest.mark.parametrize(
  ("limit", "reason"), [("disk", "no space left"), ("file", "File too large")]
)
def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, limit, reason):
  """A real disk of 4 MiB, and, wherever tests run, files of at most 512 KiB."""
  if limit == "disk":
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "jaxpref-test", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
      pytest.skip("mounting a small file system is not permitted here")
  try:
    done = run_python(WRITE_ERROR, tmp_path / "run", limit)
  finally:
    if limit == "disk":
      subprocess.run(["umount", str(tmp_path)], check=True)
  message, names, restored = done.stdout.splitlines() or [done.stderr] * 3
  assert reason in message
  assert message.endswith(
    f" in {tmp_path}/run: step 2 was not written, the checkpoint of step 1 is intact"
  )
  assert names == "['1']"
  assert restored == "1 True"
  assert "Traceback" not in done.stderr


KILLED = """
import os, signal, sys, time
from pathlib import Path
import jax.numpy as jnp, numpy as np
from jaxpref.runtime import checkpoint

directory = Path(sys.argv[1])
noise = np.random.default_rng(0).normal(size=1 << 24)
ckptr = checkpoint.Checkpointer(directory, keep=1)
ckptr.save(1, {"x": jnp.asarray(noise[:9], jnp.float32)}, {"n": 1}, {})
ckptr.save(2, {"x": jnp.asarray(noise, jnp.float32)}, {"n": 2}, {})
while not list(directory.glob("2*")):
  time.sleep(0.001)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
  done = run_python(KILLED, tmp_path)
  assert done.returncode == -9, done.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
  ckptr = checkpoint.Checkpointer(tmp_path, keep=1)
  target = {"x": jax.ShapeDtypeStruct((9,), jnp.float32, sharding=SHARDING)}
  step, state, data_state, _ = ckptr.restore(target)
  assert (step, data_state) == (1, {"n": 1})
  expected = np.random.default_rng(0).normal(size=1 << 24)[:9].astype(np.float32)
  np.testing.assert_array_equal(state["x"], expected)
  assert [p.name for p in tmp_path.iterdir()] == ["1"]


EIGHT_DEVICES = """
import json, sys
import jax, jax.numpy as jnp
from jaxpref.runtime import checkpoint

auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=auto)
def on(*spec):
  return jax.sharding.NamedSharding(mesh, jax.P(*spec))
w = jnp.arange(64.0).reshape(8, 8)
ckptr = checkpoint.Checkpointer(sys.argv[1], keep=1)
ckptr.save(1, {"w": jax.device_put(w, on("fsdp"))}, {}, {})
for spec in (("fsdp",), (None, ("data", "fsdp"))):
  target = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=on(*spec))
  got = ckptr.restore({"w": target}).state["w"]
  shard = got.addressable_shards[0].data.shape
  print(got.sharding == on(*spec), shard, bool((got == w).all()))
"""


def test_shardings_on_eight_devices(tmp_path):
  flags = xla_flags(devices=8)
  done = run_python(EIGHT_DEVICES, tmp_path, XLA_FLAGS=flags)
  assert done.stdout == "True (2, 8) True\nTrue (8, 1) True\n", done.stderr
