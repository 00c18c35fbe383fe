"""One device a core on machines without an accelerator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref.runtime import jax_setup

FORCED = "--xla_force_host_platform_device_count="


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (2, 2), (3, 2), (6, 4), (64, 8)])
def test_a_power_of_two_of_devices(monkeypatch, cores, devices):
  monkeypatch.setattr(jax_setup, "_cores", lambda: cores)
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  jax_setup.use_all_cores()
  flags = os.environ["XLA_FLAGS"].split()
  assert flags[0] == "--xla_cpu_enable_fast_math=false"  # what was there stays
  assert f"{FORCED}{devices}" in flags


@pytest.mark.parametrize("given", [f"{FORCED}8", "--xla_cpu_multi_thread_eigen=true"])
def test_a_users_choice_stands(monkeypatch, given):
  monkeypatch.setenv("XLA_FLAGS", given)
  jax_setup.use_all_cores()
  assert os.environ["XLA_FLAGS"] == given


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_containers_share_counts(monkeypatch, tmp_path):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
  monkeypatch.setattr(jax_setup, "_QUOTA", tmp_path / "cpu.max")
  assert jax_setup._cores() == 64  # no such file
  for text, cores in {"max 100000": 64, "250000 100000": 2, "50000 100000": 1}.items():
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert jax_setup._cores() == cores


def test_jax_sees_them():
  program = (
    "import json, os; from jaxpref.runtime import jax_setup; jax_setup._cores = lambda: 4;"
    "jax_setup.use_all_cores(); import jax; print(json.dumps(jax.device_count()))"
  )
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
  )
  assert json.loads(done.stdout) == 4


@pytest.mark.long
def test_importing_says_nothing():
  """No deprecation notices of what the models are built from, torch or not."""
  program = "import jaxpref; from jaxpref.models import load_pipeline; import jaxpref.generate"
  done = subprocess.run(
    [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == done.stderr == ""


def test_packages_are_imported_at_their_first_use():
  program = "import jaxpref; print(jaxpref.losses.dpo_loss.__name__)"
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert done.stdout == "dpo_loss\n"


def test_the_package_itself_imports_nothing_heavy():
  program = "import sys, jaxpref; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  assert not {"jax", "flax", "diffusers", "torch", "numpy"} & set(done.stdout.split())


def test_no_place_for_a_cache_is_no_failure(monkeypatch, tmp_path):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

  def homeless():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(Path, "home", homeless)
  assert jax_setup._own_cache() is None
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # enough without a home
  assert jax_setup._own_cache() == tmp_path / "jaxpref"
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
  assert jax_setup._own_cache() is None
