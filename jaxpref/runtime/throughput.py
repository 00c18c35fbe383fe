"""How fast a run is: rows, images and FLOPs a second, and what the devices could do."""

import time
from pathlib import Path
from typing import Any

import jax

# Dense bfloat16 peak of a device, from the vendors' data sheets, by JAX's name for it.
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
_compiled = {"seconds": 0.0}


def peak_of(device_kind: str) -> float | None:
  """FLOP/s that a device's data sheet promises in bfloat16, None where it is not known."""
  if device_kind.startswith("TPU"):
    return PEAKS.get(device_kind)
  # GPUs have their memory and their form in the name as well.
  known = [kind for kind in PEAKS if device_kind.startswith(kind)]
  return PEAKS[max(known, key=len)] if known else None


class Speedometer:
  """How fast a run is, and what it makes of its devices.

  Args:
    images_per_row: of the data, that are trained on in each row.
    flops_per_row: which an update costs, see `jaxpref.training.flops`.
  """

  def __init__(self, *, images_per_row: int, flops_per_row: float):
    self._images = images_per_row
    self._flops = flops_per_row
    self.reset()

  def add(self, rows: int) -> None:
    """Counts rows that were trained on."""
    self._rows += rows

  def measure(self) -> dict[str, float]:
    """Speed since the last time, by name.

    Returns:
      Under 'perf/': 'rows_per_second'; 'images_per_second', of the data's;
      'tflops_per_second', by what the method needs, of each device; 'mfu', that as a share
      of the device's peak in bfloat16, where it is known; 'compile_seconds', of all programs
      so far; 'peak_gib', of memory used on the first device so far, where it is known.
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
  """Traces some updates with `jax.profiler`, for TensorBoard, XProf or Perfetto.

  Args:
    directory: for the trace.
    first: number of the first update traced; earlier ones compile.
    updates: how many; 0 for none.
  """

  def __init__(self, directory: Path, *, first: int, updates: int):
    self._directory = directory
    self._updates = range(first, first + updates)
    self._on = False

  def before(self, update: int, state: Any) -> None:
    """To be called before an update is dispatched; what came before is waited for."""
    if self._updates and update == self._updates[0]:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self._directory)
      self._on = True

  def after(self, update: int, results: Any) -> None:
    """To be called after it; the last one's results are waited for."""
    if self._on and update == self._updates[-1]:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Writes what is still being traced, of a run that ended before."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
  if event == "/jax/core/compile/backend_compile_duration":
    _compiled["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)
