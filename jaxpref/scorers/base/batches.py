"""Programs over many images, in batches of one shape, on this process's devices."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.scorers import Images
from jaxpref.scorers.base import pixels

# Rows for each device. More would not make an accelerator faster; on a CPU they would only be
# padding. A batch over all devices is at most `_WHOLE`: callers come with few images.
_ROWS, _CPU_ROWS, _WHOLE = 64, 4, 256


@functools.cache
def local_mesh() -> Mesh:
  """Makes the mesh of this process's devices; scorers run in one process or in each alone."""
  return sharding.make_mesh(devices=jax.local_devices())


def on_devices(model: Any) -> Any:
  """Returns a model, a dataclass with `params`, with its parameters on `local_mesh`."""
  return dataclasses.replace(model, params=sharding.replicate(model.params, local_mesh()))


def batch_size(mesh: Mesh) -> int:
  """Returns the rows of a batch."""
  if sharding.platform_of(mesh) == "cpu":
    return _CPU_ROWS * mesh.size
  return min(_ROWS, max(1, _WHOLE // mesh.size)) * mesh.size


def precision(dtype: Any) -> contextlib.AbstractContextManager:
  """Makes products of float32 exact on accelerators too, which round them by default."""
  wide = np.dtype(dtype) == np.float32
  return jax.default_matmul_precision("highest" if wide else "default")


def run(
  program: Callable[[Any, Any], jax.Array],
  params: Any,
  rows: int,
  make: Callable[[slice], Any],
) -> np.ndarray:
  """Applies a program to rows in batches; the next one is prepared while one is computed.

  Args:
    program: jitted, (params, batch) -> [B, ...].
    params: on the devices of `local_mesh`.
    rows: number of rows, at least 1.
    make: returns the arrays [N, ...] of a slice of rows, as a tree of numpy arrays.

  Returns:
    [rows, ...] on the host.
  """
  mesh = local_mesh()
  size = batch_size(mesh)
  found: list[np.ndarray] = []
  running = None
  for start in range(0, rows, size):
    host = make(slice(start, min(start + size, rows)))
    out = program(
      params, sharding.place_batch(jax.tree.map(lambda x: _pad(x, size), host), mesh)
    )
    if running is not None:
      found.append(np.asarray(running))
    running = out
  found.append(np.asarray(running))
  return np.concatenate(found)[:rows]


def _pad(x: np.ndarray, size: int) -> np.ndarray:
  """Repeats the last row until there are `size`."""
  return np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])


def image_maker(images: Images, variant: str, size: int) -> Callable[[slice], np.ndarray]:
  """Returns a function that prepares a slice of images, in threads.

  Args:
    images: uint8 [H, W, 3] each.
    variant: see `pixels.prepare`.
    size: of the prepared images, in pixels.
  """
  prepare = functools.partial(pixels.prepare, variant=variant, size=size)

  def make(part: slice) -> np.ndarray:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      return np.stack(list(pool.map(prepare, images[part])))

  return make
