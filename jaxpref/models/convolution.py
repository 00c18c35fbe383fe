"""Convolutions whose gradients are fast inside of loops on CPUs.

XLA for CPUs has fast code for one layout of convolutions. It brings others into that layout,
but not inside of loops, where the gradients that JAX writes take up to 90 times as long
(`benchmarks/loops.py`). Here gradients are written in the fast layout.
"""

import contextlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PLAIN = (None, 1, (1, 1))  # no dilation


def fast_in_loops(platform: str) -> contextlib.AbstractContextManager:
  """Lets layers compute by `convolve` on CPUs; on other platforms nothing changes.

  Layers with groups or dilation keep their convolution.
  """
  return nn.intercept_methods(_intercept) if platform == "cpu" else contextlib.nullcontext()


def _intercept(next_fun, args, kwargs, context: nn.module.InterceptorContext):
  module = context.module
  if (
    not isinstance(module, nn.Conv)
    or context.method_name != "__call__"
    or module.is_initializing()
    or module.conv_general_dilated_cls
    or np.size(module.kernel_size) != 2
    or module.feature_group_count != 1
    or module.input_dilation not in _PLAIN
    or module.kernel_dilation not in _PLAIN
  ):
    return next_fun(*args, **kwargs)
  layer = module.clone(conv_general_dilated_cls=lambda: convolve, parent=None)
  return layer.apply({"params": module.variables["params"]}, *args, **kwargs)


class _Axis(NamedTuple):
  """A convolution along one axis: its input's and kernel's size, its stride and padding."""

  size: int
  window: int
  stride: int
  padding: tuple[int, int]


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Any,
  padding: Any,
  *,
  lhs_dilation: Any = (1, 1),
  rhs_dilation: Any = (1, 1),
  dimension_numbers: Any = None,  # noqa: ARG001
  feature_group_count: int = 1,
  precision: Any = None,
) -> jax.Array:
  """Computes a convolution over height and width, for reverse-mode gradients.

  Args:
    x: [B, H, W, C].
    kernel: [h, w, C, D].
    strides: along both axes.
    padding: 'SAME', 'VALID' or two pairs.
    lhs_dilation: must be 1.
    rhs_dilation: must be 1.
    dimension_numbers: those of the layouts above.
    feature_group_count: must be 1.
    precision: see `jax.lax.conv_general_dilated`.

  Returns:
    [B, H', W', D].

  Raises:
    ValueError: there are groups or dilations.
  """
  if {*lhs_dilation, *rhs_dilation, feature_group_count} != {1}:
    raise ValueError("convolutions with groups or dilations are not supported")
  sizes, windows = x.shape[1:3], kernel.shape[:2]
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(sizes, windows, strides, padding)
  axes = tuple(
    _Axis(size, window, stride, tuple(pads))
    for size, window, stride, pads in zip(sizes, windows, strides, padding, strict=True)
  )
  return _convolve(x, kernel, axes, precision)


def _plain(x, kernel, axes, precision):
  strides, padding = [axis.stride for axis in axes], [axis.padding for axis in axes]
  return jax.lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=_LAYOUT, precision=precision
  )


_convolve = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(x, kernel, axes, precision):
  out = _plain(x.value, kernel.value, axes, precision)
  return out, (kernel.value if x.perturbed else None, x.value if kernel.perturbed else None)


def _backward(axes, precision, kept, g):
  kernel, x = kept  # None where the other one has no gradient
  if isinstance(g, SymbolicZero):
    return None, None
  d_x = None if kernel is None else _input_gradient(axes, precision, kernel, g)
  d_kernel = None if x is None else _kernel_gradient(axes, precision, x, g)
  return d_x, d_kernel


_convolve.defvjp(_forward, _backward, symbolic_zeros=True)


def _input_gradient(axes, precision, kernel, g):
  """Convolves the output's gradient, spread out by the strides, with the mirrored kernel."""
  padding = []
  for axis, outputs in zip(axes, g.shape[1:3], strict=True):
    before = axis.window - 1 - axis.padding[0]
    spread = axis.stride * (outputs - 1) + 1
    padding.append((before, axis.size + axis.window - 1 - spread - before))
  return jax.lax.conv_general_dilated(
    *(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), (1, 1), padding),
    lhs_dilation=[axis.stride for axis in axes],
    dimension_numbers=_LAYOUT,
    precision=precision,
  )


def _kernel_gradient(axes, precision, x, g):
  """Convolves the input with the output's gradient, as a kernel that is summed over rows."""
  padding = []
  for axis, outputs in zip(axes, g.shape[1:3], strict=True):
    spread = axis.stride * (outputs - 1) + 1
    before = axis.padding[0]
    padding.append((before, axis.window - 1 + spread - axis.size - before))
  gradient = jax.lax.conv_general_dilated(
    *(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), padding),
    rhs_dilation=[axis.stride for axis in axes],
    dimension_numbers=_LAYOUT,
    precision=precision,
  )
  return gradient.transpose(1, 2, 0, 3)
