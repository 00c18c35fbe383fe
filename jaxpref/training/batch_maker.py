"""Batches on the devices, with fixed noise and the reference's known errors if asked for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.training import programs
from jaxpref.training.setup import Prepared


def make_batch_maker(
  prepared: Prepared,
  program: programs.Programs,
  base: Any,
  start: Any,
  uncond: Any,
  rows: Any,
) -> Callable[[np.ndarray, int], Any]:
  """Makes a function: (indices of rows, number of the update) -> a batch on the devices."""
  config, mesh = prepared.config, prepared.mesh
  draws = config.data.noise_draws
  known: dict[str, np.ndarray] = {}
  if draws and prepared.loss.needs.reference:
    reference = base if start is None else program.adapt(start, base)
    known = _known_errors(program.reference_errors, reference, uncond, rows, config, mesh)

  def make(index: np.ndarray, done: int) -> Any:
    batch = sharding.place_batch(rows, mesh, index)
    if draws:
      rng = np.random.default_rng([config.seed, done - 1])
      draw = rng.integers(draws, size=len(index), dtype=np.int32)
      ref = {arm: of[index, draw] for arm, of in known.items()}
      numbers = {"row": index.astype(np.int32), "draw": draw, "ref": ref}
      batch |= sharding.place_batch(numbers, mesh)
    return batch

  return make


def _known_errors(
  reference_errors: Callable, reference: Any, uncond: Any, rows: Any, config: Any, mesh: Mesh
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
