"""The device mesh, and how parameters and batches are sharded over it.

The mesh has the axes (data, fsdp) and spans the devices of all processes. Batches are sharded
over both axes, large parameters over `fsdp`. Every process holds the same host arrays and puts
its shards on its own devices; `to_host` gathers them again.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpref.errors import UserError, count

BATCH_AXES = ("data", "fsdp")
_LARGE = 1 << 20  # bytes; sharding a smaller tensor costs more communication than it saves

_log = logging.getLogger(__name__)


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] = ()) -> Mesh:
  """Makes the mesh over the devices of all processes.

  Args:
    data: number of devices along `data`; -1 takes all that `fsdp` leaves.
    fsdp: number of devices along `fsdp`; -1 takes all that `data` leaves.
    devices: the devices to use; by default all of `jax.devices()`.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  shape = _mesh_shape(data, fsdp, len(devices) or jax.device_count())
  # Auto: diffusers' modules do not run under JAX's default, explicit sharding.
  types = (AxisType.Auto,) * 2
  return jax.make_mesh(shape, BATCH_AXES, axis_types=types, devices=devices or None)


def abstract_mesh(mesh: Any, total: int) -> AbstractMesh:
  """Makes a mesh without devices, to compute shapes and shardings.

  Args:
    mesh: the configuration's section `mesh`.
    total: number of devices.

  Raises:
    UserError: the axes do not multiply to `total`.
  """
  shape = _mesh_shape(mesh.data, mesh.fsdp, total)
  return AbstractMesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _mesh_shape(data: int, fsdp: int, total: int) -> tuple[int, int]:
  if data == -1 and fsdp == -1:
    raise UserError("only one of mesh.data and mesh.fsdp can be -1")
  for name, size in (("data", data), ("fsdp", fsdp)):
    if size > 0 and total % size:
      raise UserError(
        f"mesh.{name} must divide the number of devices, {total} (got {size}): change "
        f"mesh.{name}, or set it to -1"
      )
  shape = (total // fsdp if data == -1 else data, total // data if fsdp == -1 else fsdp)
  if shape[0] * shape[1] != total:
    raise UserError(
      f"mesh.data x mesh.fsdp must be the number of devices, {total} (got {shape[0]} x "
      f"{shape[1]}): set one of them to -1"
    )
  return shape


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its rows split over all devices."""
  return NamedSharding(mesh, P(BATCH_AXES))


def params_sharding(mesh: Mesh, tree: Any, *, min_bytes: int = _LARGE) -> Any:
  """Returns a sharding for each leaf; large ones are split over `fsdp`.

  The largest axis that `fsdp` divides is split. A leaf without such an axis is replicated.

  Args:
    mesh: from `make_mesh`.
    tree: arrays or shapes: parameters, Adam moments or EMA weights.
    min_bytes: smaller leaves are replicated.
  """
  size = mesh.shape["fsdp"]

  def one(leaf):
    if size == 1 or _nbytes(leaf) < min_bytes:
      return replicated(mesh)
    axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
    if not axes:
      return replicated(mesh)
    largest = max(axes, key=lambda i: leaf.shape[i])
    spec: list[str | None] = [None] * len(leaf.shape)
    spec[largest] = "fsdp"
    return NamedSharding(mesh, P(*spec))

  return jax.tree.map(one, tree)


def list_unsharded(tree: Any, placement: Any) -> list[str]:
  """Lists the paths of large tensors that are replicated, and logs their total size.

  Args:
    tree: arrays or shapes.
    placement: the shardings of its leaves, from `params_sharding`.
  """
  leaves = jax.tree.leaves_with_path(tree)
  whole = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), _nbytes(leaf))
    for (path, leaf), where in zip(leaves, jax.tree.leaves(placement), strict=True)
    if where.is_fully_replicated and _nbytes(leaf) >= _LARGE
  ]
  if whole:
    total = sum(size for _, size in whole) / 2**20
    _log.warning(
      "%d large tensors have no axis that mesh.fsdp divides: every device holds all %.0f MiB "
      "of them, for example %s",
      *(len(whole), total, whole[0][0]),
    )
  return [name for name, _ in whole]


def _nbytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def place_params(tree: Any, mesh: Mesh) -> Any:
  """Puts parameters on the devices, sharded as in `params_sharding`, moving only what must."""
  return jax.tree.map(_place, tree, params_sharding(mesh, tree))


def gather_params(tree: Any, mesh: Mesh) -> Any:
  """All-gathers parameters inside a jitted function.

  Otherwise XLA shards the computation by channels, as the parameters are sharded, and reshards
  the activations between layers.
  """
  whole = NamedSharding(current_mesh(mesh), P())
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def platform_of(mesh: Mesh | AbstractMesh | None) -> str:
  """Returns the platform of a mesh's devices, '' of an abstract one, JAX's default of None."""
  if isinstance(mesh, Mesh):
    return mesh.devices.flat[0].platform
  return jax.default_backend() if mesh is None else ""


def current_mesh(mesh: Mesh) -> Mesh | AbstractMesh:
  """Returns the mesh to name inside a jitted function.

  Inside `jax.shard_map` that is the abstract mesh, in which some axes are already manual.
  """
  around = jax.sharding.get_abstract_mesh()
  return mesh if around.empty else around


def auto_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """Returns the names of the axes that are not manual, see `current_mesh`."""
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a whole copy of every array on every device."""
  return jax.tree.map(lambda x: _place(x, replicated(mesh)), tree)


def _place(array: Any, where: NamedSharding) -> jax.Array:
  if isinstance(array, jax.Array):
    return jax.device_put(array, where)
  # `device_put` would compare the host arrays of all processes, which costs a collective.
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def check_batch(
  batch_size: int, mesh: Mesh, *, accumulate: int = 1, section: str = "train"
) -> None:
  """Checks that a batch splits into equal micro-batches on all devices.

  Args:
    batch_size: number of rows.
    mesh: from `make_mesh`.
    accumulate: number of micro-batches.
    section: the configuration's section, for the error message.

  Raises:
    UserError: the devices do not share the rows of a micro-batch equally.
  """
  if batch_size % (accumulate * mesh.size):
    micro = f"{accumulate} micro-batches ({section}.accumulate) x " if accumulate > 1 else ""
    raise UserError(
      f"{section}.batch_size must be a multiple of {micro}{count(mesh.size, 'device')} "
      f"(got {batch_size})"
    )


def round_up(rows: int, mesh: Mesh) -> int:
  """Rounds `rows` up to a multiple of the number of devices."""
  return -(-rows // mesh.size) * mesh.size


def place_batch(tree: Any, mesh: Mesh, index: np.ndarray | None = None) -> Any:
  """Puts a batch on the devices, its rows sharded over all of them.

  Args:
    tree: numpy arrays [N, ...], equal on every process.
    mesh: from `make_mesh`.
    index: the batch's rows, int [B]; by default all N. Each process reads only the rows of its
      own devices.
  """
  where = batch_sharding(mesh)
  if index is None:
    index = np.arange(len(jax.tree.leaves(tree)[0]))

  def place(x):
    shape = (len(index), *x.shape[1:])
    return jax.make_array_from_callback(shape, where, lambda part: x[index[part[0]]])

  return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
  """Gathers arrays as numpy on every process; with several processes, a collective."""

  def fetch(x):
    if jax.process_count() == 1 or x.is_fully_replicated:
      return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(fetch, tree)
