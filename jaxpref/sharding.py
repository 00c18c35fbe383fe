"""The mesh, and where parameters and batches lie on it.

A mesh is (data, fsdp): batches are split over both axes, large parameters over `fsdp`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.errors import UserError

BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] = ()) -> Mesh:
  """The mesh over all devices.

  Args:
    data: devices along `data`; -1 fills up.
    fsdp: devices along `fsdp`; -1 fills up.
    devices: others than this machine's.

  Raises:
    UserError: they do not multiply to the number of devices.
  """
  if jax.process_count() > 1:
    raise UserError("this version runs on one host; start a single process")
  shape = _mesh_shape(data, fsdp, len(devices) or jax.device_count())
  # Auto: diffusers' modules do not run under the default, explicit sharding in types.
  types = (AxisType.Auto,) * 2
  return jax.make_mesh(shape, BATCH_AXES, axis_types=types, devices=devices or None)


def abstract_mesh(mesh: Any, total: int) -> AbstractMesh:
  """A mesh of so many devices that are not there, to reason about shapes.

  Args:
    mesh: the configuration's section.
    total: devices.

  Raises:
    UserError: as `make_mesh`.
  """
  shape = _mesh_shape(mesh.data, mesh.fsdp, total)
  return AbstractMesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _mesh_shape(data: int, fsdp: int, total: int) -> tuple[int, int]:
  if data == -1 and fsdp == -1:
    raise UserError("only one of mesh.data and mesh.fsdp can be -1")
  for name, count in (("data", data), ("fsdp", fsdp)):
    if count > 0 and total % count:
      raise UserError(f"mesh.{name} = {count} does not divide the number of devices, {total}")
  shape = (total // fsdp if data == -1 else data, total // data if fsdp == -1 else fsdp)
  if shape[0] * shape[1] != total:
    raise UserError(f"mesh.data x mesh.fsdp = {shape[0]} x {shape[1]}, but devices: {total}")
  return shape


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over all devices."""
  return NamedSharding(mesh, P(BATCH_AXES))


def params_sharding(mesh: Mesh, tree: Any, *, min_bytes: int = 1 << 20) -> Any:
  """A sharding for each leaf: the largest axis that divides, over `fsdp`, if it is large.

  Args:
    mesh: from `make_mesh`.
    tree: of arrays or shapes; parameters, moments and averages alike.
    min_bytes: tensors below it stay whole: splitting them costs more in messages than it
      saves.
  """
  size = mesh.shape["fsdp"]

  def one(leaf):
    if size == 1 or np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize < min_bytes:
      return replicated(mesh)
    axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
    if not axes:
      return replicated(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    spec: list[str | None] = [None] * len(leaf.shape)
    spec[largest] = "fsdp"
    return NamedSharding(mesh, P(*spec))

  return jax.tree.map(one, tree)


def place_params(tree: Any, mesh: Mesh) -> Any:
  """Puts parameters where `params_sharding` says; what lies there already stays."""
  return jax.device_put(tree, params_sharding(mesh, tree))


def check_batch(
  batch_size: int, mesh: Mesh, *, accumulate: int = 1, section: str = "train"
) -> None:
  """Whether a batch splits into equal micro-batches on equal devices.

  Args:
    batch_size: rows.
    mesh: from `make_mesh`.
    accumulate: micro-batches.
    section: of the configuration, for the message.

  Raises:
    UserError: it does not.
  """
  if batch_size % (accumulate * mesh.size):
    micro = f"{accumulate} micro-batches ({section}.accumulate) x " if accumulate > 1 else ""
    raise UserError(
      f"{section}.batch_size = {batch_size} does not divide by {micro}{mesh.size} devices"
    )


def round_up(rows: int, mesh: Mesh) -> int:
  """The least number of rows, not below this one, that all devices share alike."""
  return -(-rows // mesh.size) * mesh.size


def place_batch(tree: Any, mesh: Mesh) -> Any:
  """Puts this process's rows of a batch on its devices, as part of the global batch."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
