"""Batches of prompts and seeds, for updates that sample their images themselves."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxpref import sharding
from jaxpref.data import encode, row_set
from jaxpref.data.gather import Gather
from jaxpref.training import rounds
from jaxpref.training.batch_maker import BatchRows
from jaxpref.training.inputs import Part
from jaxpref.training.setup import Prepared

_SEEDS = 0x50415448  # purpose of random numbers


class PromptBatches:
  """The loader of a run whose updates sample: all prompts in a new order at each pass.

  The place in the prompts is the whole state.
  """

  def __init__(self, prepared: Prepared, guide: Any):
    """Encodes all prompts, and puts the judge's parameters on the devices.

    Args:
      prepared: the run's input, with the encoders' parameters.
      guide: conditioning that guidance leads away from, on the devices, or None.
    """
    self._prepared, self._guide = prepared, guide
    rows, pipeline, mesh = prepared.rows, prepared.pipeline, prepared.mesh
    judge = prepared.judge
    assert judge is not None  # such a run has one
    captions = [rows.caption_of(i) for i in range(len(rows))]
    self._cond = encode.encode_prompts(pipeline, mesh, captions)
    self._tokens = judge.tokenize(captions)
    self._judge = judge.place(pipeline, mesh)
    self._part = Part(row_set.collect([row_set.Row((), c) for c in captions]), {})
    self._count, self._cursor = len(captions), 0

  def get_state(self) -> dict[str, Any]:
    """Returns the place in the prompts, as JSON."""
    return {"cursor": self._cursor}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues at a place."""
    self._cursor = state["cursor"]

  def close(self) -> None:
    """Does nothing: no thread reads ahead."""

  def __next__(self) -> tuple[BatchRows, Any]:
    """Returns the prompts of the next update and the input of `make_pathwise_step`'s step."""
    config, mesh = self._prepared.config, self._prepared.mesh
    size = config.train.batch_size
    index = rounds.take_prompts(self._cursor, size, self._count, config.seed)
    numbers = np.random.default_rng([config.seed, self._cursor, _SEEDS])
    # The upper half of the seeds: evaluations use the lower half.
    seed = numbers.integers(2**31, 2**32, size=size).astype(np.uint32)
    self._cursor += size
    cond = {name: Gather(of, index) for name, of in self._cond.items()}
    tokens = jax.tree.map(lambda x: x[index], self._tokens)
    rows = sharding.place_batch({"cond": cond, "tokens": tokens, "seed": seed}, mesh)
    batch = {"rows": rows, "judge": self._judge, "guide": self._guide}
    return BatchRows(self._part, index), batch
