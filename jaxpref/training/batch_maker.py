"""Batches on the devices, with fixed noise and the reference's known errors if asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxpref import sharding
from jaxpref.data import crops, encode
from jaxpref.training import programs
from jaxpref.training.inputs import Inputs, Part, part_length
from jaxpref.training.setup import Prepared


@dataclasses.dataclass(frozen=True)
class BatchRows:
  """The rows of a batch.

  Attributes:
    part: that has them.
    index: of the rows there; with random crops also their places, see `crops.visit`, int [B].
  """

  part: Part
  index: np.ndarray

  def captions(self) -> list[str]:
    """Returns the rows' captions."""
    rows = self.part.row_set
    return [rows.caption_of(int(i) % len(rows)) for i in self.index]


class BatchMaker:
  """A function that puts batches on the devices; the loader's thread calls it."""

  def __init__(self, prepared: Prepared, inputs: Inputs):
    """Makes it, without known errors of the reference."""
    self._prepared, self._inputs = prepared, inputs
    self._known: dict[str, np.ndarray] = {}

  def add_known_errors(
    self, program: programs.Programs, base: Any, start: Any, uncond: Any
  ) -> None:
    """Computes the reference's errors on fixed noise, if `data.noise_draws` asks for it.

    Args:
      program: of the run.
      base: parameters of the base.
      start: trained parameters at the start if they are the reference, else None.
      uncond: conditioning of the dropped prompt.
    """
    prepared = self._prepared
    if prepared.config.data.noise_draws and prepared.loss.needs.reference:
      reference = base if start is None else program.adapt(start, base)
      (part,) = self._inputs.parts
      self._known = _known_errors(
        *(program.reference_errors, reference, uncond, part.rows),
        *(prepared.config, prepared.mesh),
      )

  def __call__(self, update: int, index: np.ndarray) -> tuple[BatchRows, Any]:
    """Returns the rows of an update and their batch on the devices.

    Args:
      update: number of updates before this one.
      index: of the rows, see `inputs.Inputs.find`, int [B].
    """
    config, mesh = self._prepared.config, self._prepared.mesh
    part, index = self._inputs.find(index)
    if config.data.crop == "random":
      rng = np.random.default_rng([config.seed, update, 0x43524F50])
      index = crops.visit(index, part_length(part), rng)
    batch = sharding.place_batch(part.rows, mesh, index)
    if draws := config.data.noise_draws:
      rng = np.random.default_rng([config.seed, update])
      draw = rng.integers(draws, size=len(index), dtype=np.int32)
      ref = {arm: of[index, draw] for arm, of in self._known.items()}
      numbers = {"row": index.astype(np.int32), "draw": draw, "ref": ref}
      batch |= sharding.place_batch(numbers, mesh)
    return BatchRows(part, index), batch


def _known_errors(
  reference_errors: Callable,
  reference: Any,
  uncond: Any,
  rows: Any,
  config: ConfigDict,
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Computes the reference's errors by arm for every row and noise draw, [N, D]."""
  count, draws = len(rows["latents"]), config.data.noise_draws
  found = []
  for draw in range(draws):
    numbers = {"row": np.arange(count, dtype=np.int32), "draw": np.full(count, draw, np.int32)}
    found.append(
      encode.in_batches(
        lambda params, batch: reference_errors(params, config.seed, uncond, batch),
        *(reference, rows | numbers, config.train.batch_size, mesh),
      )
    )
  return jax.tree.map(lambda *of: np.stack(of, axis=1), *found)
