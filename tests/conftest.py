"""What tests share: a pipeline of a few thousand random parameters, and a small world."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def xla_flags(*, devices: int) -> str:
  """So many devices, and programs that are compiled in less time than they save."""
  quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  return f"--xla_force_host_platform_device_count={devices} {quick}"


# One device, here and in the programs that tests start, unless a test says otherwise: bits
# are compared between the two.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=1))
# Compiled once for all workers, and the programs that tests start; `git clean` forgets it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
sys.path.insert(0, str(ROOT))  # configs/ is a folder of the repository, not a package of ours


# Comparisons with PyTorch. CI has it: there they fail rather than be skipped.
live = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None and not os.environ.get("CI"),
  reason="PyTorch is not installed",
)

# The files that take longest. Begun first, they do not leave one worker behind at the end;
# and the first two do not both wait for the shapes world's data to be drawn.
_LONG = (
  *("test_iterate", "test_export", "test_methods", "test_train", "test_pretrain"),
  *("test_benchmarks", "test_families", "test_steps", "test_lora", "test_weights"),
  *("test_improver", "test_hub"),
)


def pytest_collection_modifyitems(items):
  """Long files first, each file's tests together and in their order."""
  rank = {name: i for i, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
  """A pipeline directory as the shapes world's, tiny and untrained."""
  import families

  from configs import shapes_base
  from jaxpref.data.shapes import prompts
  from jaxpref.models import pipeline, save, text
  from jaxpref.pretrain import run as pretrain

  config = shapes_base.get_config("tiny")
  root = tmp_path_factory.mktemp("tiny")
  captions = [prompts.caption(s) for s in prompts.all_prompts("train")["position"]]
  text.train_tokenizer(
    captions,
    root / "tokenizer",
    vocab_size=config.tokenizer.vocab_size,
    max_length=config.tokenizer.max_length,
  )
  vocab_size = len(text.load_tokenizer(root / "tokenizer"))
  configs = pretrain.pipeline_configs(config, vocab_size=vocab_size)
  params = families.random_params(pipeline.build_modules(configs))
  save.save_pipeline(
    root / "pipeline",
    params,
    configs=configs,
    tokenizers_from=root,
    dtype=np.float32,
  )
  return root / "pipeline"


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> Path:
  """The shapes world's preferences in their default size, built once for all workers."""
  own = tmp_path_factory.getbasetemp()
  return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "tfds"
