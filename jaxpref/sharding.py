"""The mesh, and where parameters and batches lie on it.

A mesh is (data, fsdp): batches are split over both axes, large parameters over `fsdp`. It has
the devices of all processes. What is on the host is the same on each of them, and each puts
its part of it on its own devices; `to_host` is the way back.
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

from jaxpref import wording
from jaxpref.errors import UserError

BATCH_AXES = ("data", "fsdp")
_LARGE = 1 << 20  # bytes; splitting less costs more in messages than it saves

_log = logging.getLogger(__name__)


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] = ()) -> Mesh:
  """The mesh over all devices, of all processes.

  Args:
    data: devices along `data`; -1 fills up.
    fsdp: devices along `fsdp`; -1 fills up.
    devices: others than those there are.

  Raises:
    UserError: they do not multiply to the number of devices.
  """
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


def params_sharding(mesh: Mesh, tree: Any, *, min_bytes: int = _LARGE) -> Any:
  """A sharding for each leaf: the largest axis that divides, over `fsdp`, if it is large.

  Args:
    mesh: from `make_mesh`.
    tree: of arrays or shapes; parameters, moments and averages alike.
    min_bytes: tensors below it stay whole.
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


def large_and_whole(tree: Any, placement: Any) -> list[str]:
  """Large tensors that every device has all of, by their paths; names what it costs.

  Args:
    tree: of arrays or shapes.
    placement: their shardings, from `params_sharding`.
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
      "%d large tensors have no axis that mesh.fsdp divides; every device holds all their "
      "%.0f MiB, among them %s",
      *(len(whole), total, whole[0][0]),
    )
  return [name for name, _ in whole]


def _nbytes(leaf: Any) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize


def place_params(tree: Any, mesh: Mesh) -> Any:
  """Puts parameters where `params_sharding` says; what lies there already stays."""
  return jax.tree.map(_place, tree, params_sharding(mesh, tree))


def gather_params(tree: Any, mesh: Mesh) -> Any:
  """In a program: all of each parameter on every device, for as long as it is computed with.

  Without it XLA also splits what is computed by channels, as it finds the parameters, and
  moves activations to and fro.
  """
  whole = NamedSharding(known_mesh(mesh), P())
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def known_mesh(mesh: Mesh) -> Mesh | AbstractMesh:
  """The mesh as a program may name it: inside of `jax.shard_map` it has taken some axes."""
  around = jax.sharding.get_abstract_mesh()
  return mesh if around.empty else around


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts all of it on every device."""
  return jax.tree.map(lambda x: _place(x, replicated(mesh)), tree)


def _place(array: Any, where: NamedSharding) -> jax.Array:
  if isinstance(array, jax.Array):
    return jax.device_put(array, where)
  # `device_put` would have the processes compare what they have.
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


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
      f"{section}.batch_size = {batch_size} does not divide by "
      f"{micro}{wording.count(mesh.size, 'device')}"
    )


def round_up(rows: int, mesh: Mesh) -> int:
  """The least number of rows, not below this one, that all devices share alike."""
  return -(-rows // mesh.size) * mesh.size


def place_batch(tree: Any, mesh: Mesh, index: np.ndarray | None = None) -> Any:
  """Puts a batch on the devices, each its part of the rows.

  Args:
    tree: of numpy arrays [N, ...], alike on every process.
    mesh: from `make_mesh`.
    index: the batch's rows, int [B]; by default all N. Only those of this process's devices
      are read.
  """
  where = batch_sharding(mesh)
  if index is None:
    index = np.arange(len(jax.tree.leaves(tree)[0]))

  def place(x):
    shape = (len(index), *x.shape[1:])
    return jax.make_array_from_callback(shape, where, lambda part: x[index[part[0]]])

  return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
  """All of every array, as numpy, on each process; a collective where there are several."""

  def fetch(x):
    if jax.process_count() == 1 or x.is_fully_replicated:
      return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))

  return jax.tree.map(fetch, tree)
