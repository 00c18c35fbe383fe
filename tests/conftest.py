"""What tests share: a pipeline of a few thousand random parameters, and a small world."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def xla_flags(*, devices: int) -> str:
  """XLA's flags for `devices` CPU devices, compiling in less time than it would save.

  Only flags that every supported jaxlib knows: XLA ends the process on an unknown one.
  """
  return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"


# One device, here and in the programs that tests start, unless a test says otherwise: bits
# are compared between the two.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=1))
# Compiled once for all workers, and the programs that tests start; `git clean` forgets it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# Tracing makes many objects that live on: looking for garbage among them takes a fourth of it.
gc.set_threshold(50_000, 20, 20)
sys.path.insert(0, str(ROOT))  # this checkout, whichever is installed


# For programs that tests start: no PyTorch there, as on most machines that run jaxpref, where
# diffusers would otherwise import it.
WITHOUT_TORCH = {"PYTHONPATH": str(ROOT / "tests" / "without_torch")}


def start_cluster(processes: int, devices: int, arguments, log: Path) -> subprocess.Popen:
  """launch/local_cluster.sh as a process."""
  return subprocess.Popen(
    [ROOT / "launch" / "local_cluster.sh", str(processes), str(devices), *arguments],
    env=os.environ | WITHOUT_TORCH | {"PYTHON": sys.executable},
    stdout=log.open("a"),
    stderr=subprocess.STDOUT,
  )


# Comparisons with PyTorch. CI has it: there they fail rather than be skipped.
live = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None and not os.environ.get("CI"),
  reason="PyTorch is not installed",
)

# The files that take longest, by themselves or in their long tests. Begun first, they do not
# leave one worker behind at the end.
_LONG = (
  *("test_iterate", "test_methods", "test_train", "test_recipes", "test_export"),
  *("test_pretrain", "test_benchmarks", "test_families", "test_steps", "test_lora"),
  *("test_weights", "test_failures", "test_buckets", "test_timings", "test_improver"),
)


def pytest_collection_modifyitems(items):
  """Long files first, each file's tests together and in their order."""
  rank = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
  """A pipeline directory as the shapes world's, tiny and untrained."""
  import families

  root = tmp_path_factory.mktemp("tiny")
  families.write_tiny(root)
  return root / "pipeline"


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
