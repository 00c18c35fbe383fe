"""Rotary position embedding of the tokens of an image (Su et al., 2021)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
  """Angles by which pairs of channels are rotated, one per token and pair.

  Attributes:
    cos: float32 [N, D / 2].
    sin: float32 [N, D / 2].
  """

  cos: np.ndarray
  sin: np.ndarray


def image_rotation(tokens: int, rows: int, columns: int, axes_dims: Sequence[int]) -> Rotation:
  """Computes the rotation for `tokens` tokens of text, and an image's tokens after them.

  A token's position is (0, row, column), a text token's (0, 0, 0). Each axis rotates its own
  channels, with the frequencies 10000^(-2 i / d) for its d channels.

  Args:
    tokens: number of text tokens.
    rows: number of rows of image tokens.
    columns: number of columns of image tokens.
    axes_dims: number of channels of each axis; their sum is the size of a head.
  """
  grid = np.indices((1, rows, columns)).reshape(3, -1)
  positions = np.concatenate([np.zeros((3, tokens), int), grid], axis=1)
  angles = np.concatenate(
    [
      np.outer(place, 10_000.0 ** (-np.arange(0, dim, 2) / dim))
      for place, dim in zip(positions, axes_dims, strict=True)
    ],
    axis=1,
  )  # float64, because angles reach hundreds
  return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotates neighbouring pairs of channels [B, N, heads, D] in float32; keeps the dtype."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  first, second = pairs[..., 0], pairs[..., 1]
  cos, sin = rotation.cos[:, None], rotation.sin[:, None]
  turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)
