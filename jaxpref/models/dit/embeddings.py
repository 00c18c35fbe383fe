"""Embeddings of timesteps, pooled text and latents for diffusion transformers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models.dit.layers import TwoLayers, uniform
from jaxpref.models.interceptors import patches_by_product

_TIME_CHANNELS = 256


def embed_timesteps(t: jax.Array, channels: int = _TIME_CHANNELS) -> jax.Array:
  """Computes the sinusoidal embedding of timesteps, cosines before sines.

  Args:
    t: timesteps from 0 to 1000, not necessarily whole, [B].
    channels: C.

  Returns:
    float32 [B, C].
  """
  half = channels // 2
  exponents = -math.log(10_000.0) * np.arange(half, dtype=np.float32) / half
  # Rounded once, as in PyTorch: the last bit of a frequency moves an angle by up to 1e-4.
  frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeTextEmbedding(nn.Module):
  """The embedding that modulates all blocks: timestep, pooled text, and for some guidance.

  Attributes:
    features: D.
    dtype: of the computation.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, t: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None
  ) -> jax.Array:
    """Computes the sum of the embeddings.

    Args:
      t: timesteps from 0 to 1000, [B].
      pooled: pooled text, [B, P].
      guidance: 1000 times the guidance scale, [B], for models distilled from guidance.

    Returns:
      [B, D].
    """
    part = lambda name: TwoLayers(self.features, dtype=self.dtype, name=name)  # noqa: E731
    out = part("timestep_embedder")(embed_timesteps(t).astype(self.dtype))
    if guidance is not None:
      out += part("guidance_embedder")(embed_timesteps(guidance).astype(self.dtype))
    return out + part("text_embedder")(pooled)


class PatchEmbedding(nn.Module):
  """Latents as tokens, one per patch, with a fixed embedding of the patch's position.

  The positions are a table of a square of patches, which is stored with the weights. A smaller
  latent gets the square's centre. The table is not trained.

  Attributes:
    features: D.
    patch_size: height and width of a patch in latents.
    max_size: height and width of the table in patches.
    base_size: width, in patches, of a latent whose positions are whole numbers.
    dtype: of the computation.
  """

  features: int
  patch_size: int
  max_size: int
  base_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps latents [B, C, H, W] to tokens [B, N, D], row by row.

    Raises:
      UserError: the latents are larger than the table, or not of whole patches.
    """
    batch, channels, *size = x.shape
    rows, columns = (n // self.patch_size for n in size)
    if max(rows, columns) > self.max_size or any(n % self.patch_size for n in size):
      raise UserError(
        f"latents of {size[0]} x {size[1]} do not fit the transformer: both must be multiples "
        f"of {self.patch_size}, at most {self.patch_size * self.max_size}"
      )
    table = self.param(
      "pos_embed",
      lambda _, shape: position_table(
        shape[-1], self.max_size, self.max_size, self.base_size
      ).reshape(shape),
      (1, self.max_size**2, self.features),
    )
    init = uniform((channels * self.patch_size**2) ** -0.5)
    project = nn.Conv(
      self.features,
      kernel_size=(self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding="VALID",
      dtype=self.dtype,
      kernel_init=init,
      bias_init=init,
      name="proj",
    )
    with nn.intercept_methods(patches_by_product):
      tokens = project(x.transpose(0, 2, 3, 1))
    top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
    places = self.max_size * (top + np.arange(rows)[:, None]) + left + np.arange(columns)
    # Looked up, not sliced: of a sharded table, each device looks up what it has, and only the
    # result is communicated.
    centre = jnp.take(jax.lax.stop_gradient(table)[0], places, axis=0, mode="clip")
    tokens += centre.astype(self.dtype)
    return tokens.reshape(batch, rows * columns, self.features)


def position_table(features: int, rows: int, columns: int, base_size: float) -> jax.Array:
  """Computes the sinusoidal embedding of a grid's positions.

  Half of the channels are of the column, half of the row; of each half, sines come first.
  Positions are scaled so that the grid is `base_size` high and wide.

  Args:
    features: D.
    rows: height of the grid in patches.
    columns: width of the grid in patches.
    base_size: the largest position, exclusive.

  Returns:
    float32 [rows, columns, D].
  """
  quarter = features // 4
  frequencies = 10_000.0 ** -(np.arange(quarter) / quarter)

  def embed(size):
    positions = np.arange(size, dtype=np.float32) / np.float32(size / base_size)
    angles = np.outer(positions.astype(np.float64), frequencies)
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)

  # In jax, so that nothing large is computed where only shapes are.
  shape = (rows, columns, 2 * quarter)
  by_column = jnp.broadcast_to(embed(columns), shape)
  by_row = jnp.broadcast_to(embed(rows)[:, None], shape)
  return jnp.concatenate([by_column, by_row], axis=2)
