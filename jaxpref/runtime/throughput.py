"""Training speed: rows, images and FLOPs per second, devices' peaks, and profiler traces."""

import time
from pathlib import Path
from typing import Any

import jax

# JAX's device kind to its dense bfloat16 peak in FLOP/s, from the vendors' data sheets.
PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}
_compiled = {"seconds": 0.0}  # compile time of this process so far


def peak_of(device_kind: str) -> float | None:
  """Returns the bfloat16 peak of a device in FLOP/s, or None if it is not known."""
  if device_kind.startswith("TPU"):
    return PEAKS.get(device_kind)
  # The names of GPUs go on with memory size and form factor, so the longest prefix counts.
  known = [kind for kind in PEAKS if device_kind.startswith(kind)]
  return PEAKS[max(known, key=len)] if known else None


class Speedometer:
  """A meter of training speed and device utilization.

  Args:
    images_per_row: number of the data's images in each row.
    flops_per_row: FLOPs of an update per row (see `jaxpref.training.flops`).
  """

  def __init__(self, *, images_per_row: int, flops_per_row: float):
    self._images = images_per_row
    self._flops = flops_per_row
    self.reset()

  def add(self, rows: int) -> None:
    """Counts rows that were trained on."""
    self._rows += rows

  def measure(self) -> dict[str, float]:
    """Measures the speed since the last call and starts a new interval.

    Returns:
      Metrics under 'perf/':
      'rows_per_second';
      'images_per_second': the data's images;
      'tflops_per_second': per device, counting only the FLOPs that the method needs;
      'mfu': the same as a share of the device's bfloat16 peak, if the peak is known;
      'compile_seconds': total compile time of the process so far;
      'peak_gib': peak memory of the first local device so far, if it reports that.
    """
    speed = self._rows / (time.perf_counter() - self._begin)
    device = jax.local_devices()[0]
    flops = speed * self._flops / jax.device_count()
    found = {
      "rows_per_second": speed,
      "images_per_second": speed * self._images,
      "tflops_per_second": flops / 1e12,
      "compile_seconds": _compiled["seconds"],
    }
    if peak := peak_of(device.device_kind):
      found["mfu"] = flops / peak
    if peak := (device.memory_stats() or {}).get("peak_bytes_in_use"):
      found["peak_gib"] = peak / 2**30
    self.reset()
    return {f"perf/{name}": value for name, value in found.items()}

  def reset(self) -> None:
    """Starts a new interval."""
    self._rows = 0
    self._begin = time.perf_counter()


class Profiler:
  """A profiler that traces a few updates, for TensorBoard, XProf or Perfetto.

  Args:
    directory: where the trace is written.
    first: index of the first update to trace; earlier ones include compilation.
    updates: number of updates to trace; 0 traces none.
  """

  def __init__(self, directory: Path, *, first: int, updates: int):
    self._directory = directory
    self._updates = range(first, first + updates)
    self._on = False

  def before(self, update: int, state: Any) -> None:
    """Starts the trace if `update` is the first one; must be called before its dispatch.

    Waits for `state` first, so that the trace leaves out earlier updates.
    """
    if self._updates and update == self._updates[0]:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._directory)
      self._on = True

  def after(self, update: int, results: Any) -> None:
    """Ends the trace once `results` are computed, if `update` is the last one to trace."""
    if self._on and update == self._updates[-1]:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends and writes an unfinished trace, if the run ends during it."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
  if event == "/jax/core/compile/backend_compile_duration":
    _compiled["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)
