"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases and the progress line.

Metric names are paths: `loss`, `rewards/margin`, `optim/grad_norm`, `time/rollout`.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from jaxpref.errors import UserError, storage_error
from jaxpref.runtime import wandb_run
from jaxpref.runtime import workdir as workdir_lib

FILE = "metrics.jsonl"
_LONGEST_LINE = 1 << 20  # bytes

_log = logging.getLogger(__name__)


class MetricWriter:
  """A writer of `<workdir>/metrics.jsonl` and, if TensorBoard is installed, of its events.

  Args:
    workdir: the run's directory.
    total_updates: number of updates of the whole run, for the progress line.
    start_step: step at which the run resumes; later lines are dropped, because the run
      writes them again. None starts a new file.
    line_seconds: seconds between progress lines if stderr is not a terminal.
    wandb: a run in Weights & Biases that gets the same scalars, or None.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_updates: int,
    start_step: int | None = None,
    line_seconds: float = 10.0,
    wandb: wandb_run.WandbRun | None = None,
  ):
    self._path = Path(workdir) / FILE
    self._total = total_updates
    self._line_seconds = line_seconds
    kept = [] if start_step is None else _read_lines(self._path)
    kept = [line for line in kept if start_step is None or line["step"] <= start_step]
    workdir_lib.write_text(self._path, "".join(json.dumps(x) + "\n" for x in kept))
    # Unbuffered, so that each line reaches the file at once and a failed write is not repeated.
    self._file = self._path.open("ab", buffering=0)
    self._events = _open_tensorboard(Path(workdir) / "tensorboard")
    self._wandb = wandb
    self._first: tuple[int, float] | None = None
    self._printed = -math.inf

  def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
    """Writes one line of scalars; non-finite values become null.

    Args:
      step: number of updates made.
      metrics: name to scalar (Python, NumPy or JAX; converting a JAX scalar waits for it).

    Raises:
      UserError: the line cannot be written, for example because the disk is full.
    """
    values = {name: float(value) for name, value in metrics.items()}
    line: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
    line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
    data = (json.dumps(line) + "\n").encode()
    try:
      written = self._file.write(data)
    except OSError as error:
      message = f"cannot write {self._path}: {error.strerror}"
      raise storage_error(message, error) from error
    if written != len(data):
      raise UserError(f"cannot write {self._path}: no space left on the device")
    if self._events is not None:
      self._events.write_scalars(step, values)
    if self._wandb is not None:
      self._wandb.write(step, values)

  def progress(
    self,
    step: int,
    *,
    loss: float,
    images_per_second: float,
    shares: Mapping[str, float],
  ) -> None:
    """Prints the progress of the run to stderr.

    A terminal shows one line that is overwritten; other outputs get a line every
    `line_seconds`.

    Args:
      step: number of updates made.
      loss: the last update's loss.
      images_per_second: training speed.
      shares: name to share of the time, in [0, 1] (see `Stopwatch.shares`).
    """
    now = time.monotonic()
    # The first update includes compilation, so the ETA is measured from its end.
    self._first = self._first or (step, now)
    terminal = sys.stderr.isatty()
    if now - self._printed < (0.1 if terminal else self._line_seconds) and step < self._total:
      return
    self._printed = now
    parts = [
      f"update {step}/{self._total}",
      f"loss {loss:.4f}",
      f"{images_per_second:.1f} img/s",
      *(f"{name} {100 * share:.0f} %" for name, share in shares.items()),
      f"ETA {self._eta(step, now)}",
    ]
    line = "  ".join(parts)
    if terminal:
      width = shutil.get_terminal_size().columns - 1
      end = "\n" if step >= self._total else ""
      print(f"\r\x1b[K{line[:width]}", end=end, file=sys.stderr, flush=True)
    else:
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._events is not None:
      self._events.flush()
      self._events.close()
    if self._wandb is not None:
      self._wandb.close()

  def _eta(self, step: int, now: float) -> str:
    first_step, first_time = self._first or (step, now)
    if step == first_step:
      return "-" if step < self._total else "0:00"
    seconds = (now - first_time) / (step - first_step) * (self._total - step)
    minutes, seconds = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Stopwatch:
  """A stopwatch that adds up seconds by name: `with clock("rollout"): ...`.

  JAX dispatches asynchronously, so the block must wait for its result
  (`jax.block_until_ready`), or the time is not counted.
  """

  def __init__(self):
    self.reset()

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    """Adds the duration of the block to `name`."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - begin
      self._seconds[name] = self._seconds.get(name, 0.0) + spent

  def elapsed(self) -> float:
    """Returns the seconds since the start or the last `reset`."""
    return time.perf_counter() - self._begin

  def shares(self) -> dict[str, float]:
    """Returns each name's share of the elapsed time, in [0, 1]; they need not add up to 1."""
    elapsed = self.elapsed()
    return {name: seconds / elapsed for name, seconds in self._seconds.items()}

  def reset(self) -> None:
    """Starts a new interval."""
    self._seconds: dict[str, float] = {}
    self._begin = time.perf_counter()


def read_curves(workdir: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
  """Reads `metrics.jsonl` as curves, for plots.

  Returns:
    Metric name to points (step, value), with ascending steps; null is read as nan.
  """
  curves: dict[str, list[tuple[int, float]]] = {}
  for line in _read_lines(Path(workdir) / FILE):
    for name, value in line.items():
      if name not in ("step", "time"):
        point = (line["step"], math.nan if value is None else value)
        curves.setdefault(name, []).append(point)
  return curves


def _read_lines(path: Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file, ordered by step.

  Raises:
    UserError: the file is not a regular file, or a line is not a line of metrics.
  """
  if not os.path.lexists(path):
    return []
  if not path.is_file():
    raise UserError(f"{path} is not a regular file: move it away")
  lines = []
  with path.open("rb") as file:
    for number in itertools.count(1):
      data = file.readline(_LONGEST_LINE)
      # A killed run may leave an unfinished last line, which is ignored.
      if not data.endswith(b"\n") and len(data) < _LONGEST_LINE:
        break
      try:
        line = workdir_lib.parse_json(data)
      except ValueError:
        line = None
      if not _is_line(line):
        raise UserError(
          f"{path}: line {number} is not a line of metrics: move the file away to resume "
          "without the earlier metrics"
        )
      lines.append(line)
  return sorted(lines, key=lambda line: line["step"])


def _is_line(line: Any) -> bool:
  if not isinstance(line, dict) or type(line.get("step")) is not int:
    return False
  largest = sys.float_info.max
  numbers = [value for value in line.values() if value is not None]
  return all(isinstance(x, int | float) and abs(x) <= largest for x in numbers)


def _open_tensorboard(directory: Path) -> Any:
  """Returns a writer of TensorBoard events, or None if a package for it is missing."""
  for package in ("tensorflow", "tensorboard", "clu"):
    if importlib.util.find_spec(package) is None:
      _log.info("no TensorBoard events: %s is not installed", package)
      return None
  # TensorFlow only writes the event files; these settings silence its log messages.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    import tensorflow as tf  # noqa: PLC0415
    from clu import metric_writers  # noqa: PLC0415

    # Otherwise TensorFlow would reserve the GPU memory that JAX needs.
    tf.config.set_visible_devices([], "GPU")
    return metric_writers.SummaryWriter(str(directory))
  except (ImportError, RuntimeError) as error:
    _log.info("no TensorBoard events: %s", error)
    return None
