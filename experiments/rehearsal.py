"""Makes the inputs of rehearsals: a tiny pipeline, files like the real ones, prompts."""

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpref import config as config_lib
from jaxpref.models import pipeline, save, text
from jaxpref.pretrain import run as pretrain
from jaxpref.shapes import prompts

ROOT = Path(__file__).resolve().parents[1]


class Inputs(NamedTuple):
  """Paths of Pick-a-Pic's files, of the test prompts and of the pipeline; scorers' names."""

  data: Path
  test: Path
  model: Path
  scorers: dict[str, str]


def write_inputs(out: Path, titles: Iterable[str]) -> Inputs:
  """Writes small inputs into `out`; those of an earlier start stay.

  Args:
    out: directory of the experiment.
    titles: the paper's names of its scorers; each gets a scorer of `random_scorers.py`.
  """
  spec = importlib.util.spec_from_file_location("formats", ROOT / "benchmarks" / "formats.py")
  assert spec is not None and spec.loader is not None
  formats = importlib.util.module_from_spec(spec)
  sys.modules["formats"] = formats
  spec.loader.exec_module(formats)
  scorers = {title: f"random_scorers.{title.lower()}" for title in titles}
  found = Inputs(out / "raw", out / "test.txt", out / "pipeline", scorers)
  if not found.data.exists():
    formats.make("pickapic", found.data, seed=0, count=32, faults=False)
  if not (found.model / "model_index.json").exists():
    write_tiny(out)
  found.test.write_text("a red ring\na blue star\n")
  return found


def write_tiny(root: Path) -> None:
  """Writes a tiny shapes pipeline with random parameters to `root/pipeline`."""
  config = config_lib.load_config("shapes_base:tiny")
  captions = [prompts.caption(s) for s in prompts.all_prompts("train")["position"]]
  text.train_tokenizer(
    captions,
    root / "tokenizer",
    vocab_size=config.tokenizer.vocab_size,
    max_length=config.tokenizer.max_length,
  )
  vocab_size = len(text.load_tokenizer(root / "tokenizer"))
  configs = pretrain.pipeline_configs(config, vocab_size=vocab_size)
  params = random_params(pipeline.build_modules(configs))
  save.save_pipeline(
    root / "pipeline", params, configs=configs, tokenizers_from=root, dtype=np.float32
  )


def random_params(modules: Mapping[str, Any]) -> dict[str, Any]:
  """Samples parameters by part; the modules' own initial zeros and ones would hide mistakes."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25.0
    return (rng.standard_normal(leaf.shape) / np.sqrt(fan)).astype(np.float32)

  return {k: jax.tree.map(draw, pipeline.abstract_params(m)) for k, m in modules.items()}
