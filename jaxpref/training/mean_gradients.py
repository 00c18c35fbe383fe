"""Gradients and metrics, averaged over micro-batches and devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def average(gradients_of: Callable, accumulate: int, mesh: Mesh) -> Callable:
  """Makes the function of gradients and metrics, averaged over micro-batches and devices.

  Args:
    gradients_of: (trained, fixed, rows, mean=) -> (gradients, metrics) of a micro-batch. What
      is `fixed` has no gradient; `mean` averages an array over all devices.
    accumulate: number of micro-batches.
    mesh: from `sharding.make_mesh`.

  Returns:
    `gradients(trained, fixed, rows) -> (gradients, metrics)`.
  """
  return _reduced(functools.partial(_over_micro_batches, gradients_of, accumulate), mesh)


def _over_micro_batches(
  gradients_of: Callable,
  accumulate: int,
  trained: Any,
  fixed: Any,
  rows: Any,
  mean: Callable[[jax.Array], jax.Array] = jnp.mean,
) -> tuple[Any, dict[str, jax.Array]]:
  """Returns gradients and metrics of one device's rows, averaged over micro-batches."""
  gradients = functools.partial(gradients_of, mean=mean)
  if accumulate == 1:
    return gradients(trained, fixed, rows)

  def add(total, micro):
    return jax.tree.map(jnp.add, total, gradients(trained, fixed, micro)), None

  # Strided, not contiguous, rows: micro-batches are then the same on any mesh.
  micros = jax.tree.map(
    lambda x: x.reshape((-1, accumulate, *x.shape[1:])).swapaxes(0, 1), rows
  )
  first = jax.tree.map(lambda x: x[0], micros)
  shapes = jax.eval_shape(gradients, trained, fixed, first)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(add, zeros, micros)
  return jax.tree.map(lambda x: x / accumulate, total)


def _reduced(mean_gradients: Callable, mesh: Mesh) -> Callable:
  """Averages gradients over the mesh's `data` axis once, after the last micro-batch."""
  if mesh.shape["data"] == 1 < mesh.shape["fsdp"]:
    # XLA's partitioner refuses a manual axis of one device beside tensors that are sharded
    # over another axis. One device has nothing to average.
    return mean_gradients

  def mean_of_all(x):
    return jax.lax.pmean(jnp.mean(x), "data")

  return jax.shard_map(
    lambda trained, fixed, rows: jax.lax.pmean(
      mean_gradients(trained, fixed, rows, mean=mean_of_all), "data"
    ),
    mesh=mesh,
    in_specs=(P(), P(), P("data")),
    out_specs=P(),
    axis_names={"data"},
    # With the check, parameters would count as replicated, and JAX would add an all-reduce
    # of the gradient to every micro-batch.
    check_vma=False,
  )
