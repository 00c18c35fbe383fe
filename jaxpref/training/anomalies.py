"""What a run looks for in its own numbers: no effect, spikes, what is not finite."""

import collections
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import safetensors.numpy

from jaxpref import wording
from jaxpref.errors import DivergedError
from jaxpref.runtime import distributed, workdir
from jaxpref.training.setup import Prepared

_REMEMBERED, _ENOUGH = 50, 10  # logged updates that a spike is measured against; at least
_SPIKE, _HIGH = 10.0, 3.0  # in spreads of those updates, and in their medians

_log = logging.getLogger(__name__)


class Finite:
  """Says of updates that they were skipped, and ends a run of too many.

  Args:
    prepared: the run.
    rows: that it deals, as `encode.encode_rows` makes them.
    workdir: where `diverged/` gets the rows of the last such update.
  """

  def __init__(self, prepared: Prepared, rows: Any, workdir: Path):
    self._prepared, self._rows, self._directory = prepared, rows, workdir / "diverged"
    self._in_a_row: list[tuple] = []

  def check(self, done: int, index: np.ndarray, values: Mapping[str, jax.Array]) -> None:
    """Looks at an update, by its number, the indices of its rows and its metrics.

    Raises:
      DivergedError: more were skipped than `train.max_skipped`.
    """
    skipped, loss, norm = jax.device_get(
      [values[name] for name in ("optim/skipped", "loss", "optim/grad_norm")]
    )
    if np.isfinite(loss) and np.isfinite(norm):
      self._in_a_row.clear()
      return
    self._in_a_row.append((done, index, values))
    _log.warning(
      "update %d changed nothing: its loss is %s, its gradient's norm %s (skipped so far: %d)",
      *(done, loss, norm, skipped),
    )
    if skipped > self._prepared.config.train.max_skipped:
      self._end()

  @property
  def is_well(self) -> bool:
    """Whether the last update was finite; else no checkpoint takes a good one's place."""
    return not self._in_a_row

  def check_at_the_end(self) -> None:
    """A run whose last updates were skipped has diverged; a single one may be a bad row.

    Raises:
      DivergedError: the last updates were skipped, more than one.
    """
    if len(self._in_a_row) > 1:
      self._end()

  def _end(self) -> NoReturn:
    done, index, values = self._in_a_row[-1]
    distributed.first(
      lambda: _keep_rows(self._directory, self._prepared, self._rows, done, index, values)
    )
    skipped = int(values["optim/skipped"])
    were = "was" if skipped == 1 else "were"
    raise DivergedError(
      "the run has diverged, which a lower optim.lr may prevent: "
      f"{wording.count(skipped, 'update')} {were} not finite and {were} skipped. The rows of "
      f"the last, update {done}, are in {self._directory}; checkpoints before are intact"
    )


def _keep_rows(
  directory: Path,
  prepared: Prepared,
  rows: Any,
  done: int,
  index: np.ndarray,
  values: Mapping[str, jax.Array],
) -> None:
  arrays = {"row": np.asarray(index), "latents": rows["latents"][index]}
  if "std" in rows:
    arrays["std"] = rows["std"][index]
  arrays |= {f"cond.{name}": of[index] for name, of in rows["cond"].items()}
  workdir.write_bytes(directory / "batch.safetensors", safetensors.numpy.save(arrays))
  described = {
    "update": done,
    "captions": [prepared.rows[i % len(prepared.rows)].caption for i in index],
    "metrics": {name: str(float(v)) for name, v in values.items()},
  }
  workdir.write_json(directory / "batch.json", described)


def warn_of_nothing(values: Mapping[str, float], done: int) -> None:
  """Where an update has learned nothing, which nobody wants to wait for."""
  if values["optim/grad_norm"] == 0.0:
    closed = ": every hinge is closed, see loss.margin" if "dro/active" in values else ""
    _log.warning("update %d learned nothing, its gradient is 0%s", done, closed)


class Spikes:
  """Warns where the loss or the gradient leaves the range of the last logged updates."""

  def __init__(self):
    self._seen: dict[str, collections.deque] = {}

  def add(self, done: int, values: Mapping[str, float]) -> None:
    """Looks at an update's values by name, then remembers them."""
    for name, value in values.items():
      seen = self._seen.setdefault(name, collections.deque(maxlen=_REMEMBERED))
      if not np.isfinite(value):
        continue  # `Finite` has said so
      if len(seen) >= _ENOUGH:
        median = statistics.median(seen)
        spread = statistics.median(abs(x - median) for x in seen)
        if value > median + _SPIKE * spread and value > _HIGH * abs(median):
          _log.warning(
            "%s is %.3g at update %d, its median over the last %d logged updates %.3g; if "
            "that lasts, a lower optim.lr may help",
            *(name, value, done, len(seen), median),
          )
      seen.append(value)
