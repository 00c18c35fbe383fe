"""Fixtures and helpers that tests share: a tiny random pipeline and small data sets."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def xla_flags(*, devices: int) -> str:
  """Returns XLA's flags for `devices` CPU devices and fast compilation.

  All supported versions of jaxlib must know the flags: XLA aborts on an unknown flag.
  """
  return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


# Tests and the programs that they start have one device unless a test sets another number,
# because tests compare their results bit by bit.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=1))
# Workers and the programs that tests start share compiled programs; `git clean` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Tracing makes many long-lived objects: frequent garbage collection takes a fourth of its time.
gc.set_threshold(50_000, 20, 20)
sys.path.insert(0, str(ROOT))  # tests this checkout, not an installed version


# Hides PyTorch from the programs that tests start: most machines that run jaxpref do not have
# it, and diffusers would import it.
WITHOUT_TORCH = {"PYTHONPATH": str(ROOT / "tests" / "without_torch")}


def on_eight_devices(*arguments):
  """Runs Python with eight CPU devices, in the checkout; returns its last line, from JSON."""
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=ROOT,
    env=os.environ | WITHOUT_TORCH | {"XLA_FLAGS": xla_flags(devices=8)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


def start_cluster(processes: int, devices: int, arguments, log: Path) -> subprocess.Popen:
  """Starts launch/local_cluster.sh."""
  return subprocess.Popen(
    [ROOT / "launch" / "local_cluster.sh", str(processes), str(devices), *arguments],
    env=os.environ | WITHOUT_TORCH | {"PYTHON": sys.executable},
    stdout=log.open("a"),
    stderr=subprocess.STDOUT,
  )


# Marks comparisons with PyTorch. In CI they fail without PyTorch instead of skipping.
live = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None and not os.environ.get("CI"),
  reason="PyTorch is not installed",
)

# The slowest files, because of all their tests or of the long ones. They start first, so that
# no worker is still busy with one of them at the end.
_LONG = (
  *("test_iterate", "test_methods", "test_train", "test_recipes", "test_export"),
  *("test_pretrain", "test_benchmarks", "test_families", "test_steps", "test_lora"),
  *("test_weights", "test_failures", "test_buckets", "test_timings", "test_improver"),
)


def pytest_collection_modifyitems(items):
  """Puts slow files first; keeps the tests of a file together and in order."""
  rank = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
  """Writes a tiny, untrained pipeline directory with the layout of the bundled pipeline."""
  import families

  root = tmp_path_factory.mktemp("tiny")
  families.write_tiny(root)
  return root / "pipeline"


@pytest.fixture(scope="session")
def flux_directory(tmp_path_factory) -> Path:
  """Writes a narrow pipeline of Flux.1-dev with random weights."""
  import flow_networks

  return flow_networks.write_flux(tmp_path_factory.mktemp("flux"), "flux.1-dev")


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> Path:
  """The shapes world's data sets, a tenth of their default size, built once for all workers.

  They lie where the default ones would: runs, and programs that tests start, open these.
  """
  from jaxpref.runtime import tfds_store
  from jaxpref.shapes import builder, rankings

  own = tmp_path_factory.getbasetemp()
  directory = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "tfds"
  pairs = builder.PairsConfig(name="default", num_train=300, num_test=30)
  lists = rankings.ListsConfig(name="of-3", num_train=100, num_test=10, num_images=3)
  with pytest.MonkeyPatch.context() as patch:  # TFDS has one configuration of a name
    patch.setattr(builder.ShapesPreferences, "BUILDER_CONFIGS", [pairs])
    tfds_store.load(builder.ShapesPreferences, pairs, "train", data_dir=directory)
  tfds_store.load(rankings.ShapesRankings, lists, "train", data_dir=directory)
  return directory


@pytest.fixture
def in_float64():
  """Computes in float64 for the length of a test."""
  import jax

  scope = jax if hasattr(jax, "enable_x64") else jax.experimental  # older versions
  with scope.enable_x64(True):
    yield


@pytest.fixture
def register_plugin(tmp_path, monkeypatch):
  """Installs a package with one module, registered under a name by an entry point."""

  def register(group, name, module, source):
    (tmp_path / f"{module}.py").write_text(source)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)

  return register
