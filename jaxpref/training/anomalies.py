"""Checks of a run's health: zero gradients, spikes and non-finite updates."""

import collections
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import safetensors.numpy

from jaxpref.errors import DivergedError, count
from jaxpref.runtime import distributed, workdir
from jaxpref.training.batch_maker import BatchRows
from jaxpref.training.setup import Prepared

# Most and fewest past logged updates that a value is compared with.
_REMEMBERED, _ENOUGH = 50, 10
# A spike exceeds their median by `_SPIKE` median absolute deviations and `_HIGH`-fold.
_SPIKE, _HIGH = 10.0, 3.0

_log = logging.getLogger(__name__)


class FiniteCheck:
  """A check of each update, which ends a run with too many non-finite ones.

  Args:
    prepared: the run's input.
    workdir: the run's workdir; its `diverged/` receives the rows of the last such update.
  """

  def __init__(self, prepared: Prepared, workdir: Path):
    self._prepared, self._directory = prepared, workdir / "diverged"
    self._consecutive: list[tuple] = []  # non-finite updates since the last finite one

  def check(self, done: int, taken: BatchRows, values: Mapping[str, jax.Array]) -> None:
    """Warns if an update is not finite.

    Args:
      done: number of the update.
      taken: its rows.
      values: its metrics by name.

    Raises:
      DivergedError: the run has skipped more than `train.max_skipped` updates.
    """
    skipped, loss, norm = jax.device_get(
      [values[name] for name in ("optim/skipped", "loss", "optim/grad_norm")]
    )
    if np.isfinite(loss) and np.isfinite(norm):
      self._consecutive.clear()
      return
    self._consecutive.append((done, taken, values))
    _log.warning(
      "update %d changed nothing: its loss is %s, its gradient norm %s (skipped so far: %d)",
      *(done, loss, norm, skipped),
    )
    if skipped > self._prepared.config.train.max_skipped:
      self._end()

  @property
  def is_finite(self) -> bool:
    """Whether the last update was finite; if not, a checkpoint that is due must wait."""
    return not self._consecutive

  def check_at_the_end(self) -> None:
    """Ends a run whose last updates were skipped; a single one may be due to a bad row.

    Raises:
      DivergedError: at least the last two updates were skipped.
    """
    if len(self._consecutive) > 1:
      self._end()

  def _end(self) -> NoReturn:
    done, taken, values = self._consecutive[-1]
    distributed.first(lambda: _write_rows(self._directory, done, taken, values))
    skipped = int(values["optim/skipped"])
    were = "was" if skipped == 1 else "were"
    raise DivergedError(
      "the run has diverged, which a lower optim.lr may prevent: "
      f"{count(skipped, 'update')} {were} not finite and {were} skipped. The rows of "
      f"the last, update {done}, are in {self._directory}; earlier checkpoints are intact"
    )


def _write_rows(
  directory: Path, done: int, taken: BatchRows, values: Mapping[str, jax.Array]
) -> None:
  leaves = jax.tree.leaves_with_path(taken.part.rows)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(
      of[taken.index]
    )
    for path, of in leaves
  }
  arrays["row"] = np.asarray(taken.index)
  workdir.write_bytes(directory / "batch.safetensors", safetensors.numpy.save(arrays))
  described = {
    "update": done,
    "captions": taken.captions(),
    "metrics": {name: str(float(v)) for name, v in values.items()},
  }
  workdir.write_json(directory / "batch.json", described)


def warn_of_zero_gradient(values: Mapping[str, float], done: int) -> None:
  """Warns if the gradient of an update is exactly zero."""
  if values["optim/grad_norm"] == 0.0:
    closed = ": every hinge is closed (see loss.margin)" if "dro/active" in values else ""
    _log.warning("update %d learned nothing, its gradient is 0%s", done, closed)


class Spikes:
  """A detector of spikes: values far above those of the last logged updates."""

  def __init__(self):
    self._seen: dict[str, collections.deque] = {}

  def add(self, done: int, values: Mapping[str, float]) -> None:
    """Warns of spikes among an update's values, then remembers the values by name."""
    for name, value in values.items():
      seen = self._seen.setdefault(name, collections.deque(maxlen=_REMEMBERED))
      if not np.isfinite(value):
        continue  # `FiniteCheck` warns of these
      if len(seen) >= _ENOUGH:
        median = statistics.median(seen)
        spread = statistics.median(abs(x - median) for x in seen)
        if value > median + _SPIKE * spread and value > _HIGH * abs(median):
          _log.warning(
            "%s is %.3g at update %d; its median over the last %d logged updates is %.3g. If "
            "this persists, a lower optim.lr may help",
            *(name, value, done, len(seen), median),
          )
      seen.append(value)
