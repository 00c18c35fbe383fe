"""Resizing and cropping of images for scorers: four published ways, and one inside a program.

The shortest edge becomes S pixels long, bicubic, and the centre S x S is kept. Publications
differ in where they round, so in the scores:

- `pil`: Pillow resizes the 8-bit image (open_clip, ImageReward).
- `hf`: the same, but the crop's corner is rounded down (transformers' image processor).
- `tensor_aa`: a float image is resized with antialiasing, neither rounded nor clipped (the
  package hpsv2 with torchvision 0.17 or later).
- `tensor_noaa`: the same without antialiasing (the package hpsv2 with older torchvision).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy import sparse

from jaxpref.errors import UserError
from jaxpref.scorers import Images

VARIANTS = ("pil", "hf", "tensor_aa", "tensor_noaa")
_MOST_ASPECT = 100  # longer images would need gigabytes when their short edge is enlarged


def check_images(images: Images, prompts: Sequence[str]) -> None:
  """Checks a scorer's input.

  Raises:
    UserError: an image is not uint8 [H, W, 3], or the numbers of images and prompts differ.
  """
  if len(images) != len(prompts):
    raise UserError(f"{len(images)} images need as many prompts (got {len(prompts)})")
  for i, image in enumerate(images):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
      raise UserError(
        f"image {i} must be uint8 [H, W, 3] (got {image.dtype} {list(image.shape)}): convert "
        "it to RGB"
      )
    short, long = sorted(image.shape[:2])
    if long > _MOST_ASPECT * short:
      raise UserError(
        f"image {i} is {image.shape[1]} x {image.shape[0]} pixels; a scorer takes images whose "
        f"longer side is at most {_MOST_ASPECT} times the shorter one"
      )


def resized(height: int, width: int, size: int) -> tuple[int, int]:
  """Returns the height and width at which the shortest edge is `size`."""
  short, long = sorted((height, width))
  other = int(size * long / short)
  return (size, other) if height <= width else (other, size)


def corner(length: int, size: int, *, rounds: Callable[[float], int] = round) -> int:
  """Returns where the centre of `size` pixels begins; torchvision rounds halves to even."""
  return rounds((length - size) / 2)


def prepare(image: np.ndarray, variant: str, size: int) -> np.ndarray:
  """Resizes and crops an image.

  Args:
    image: uint8 [H, W, 3].
    variant: one of `VARIANTS`.
    size: S, in pixels.

  Returns:
    [S, S, 3]: uint8 for 'pil' and 'hf', otherwise float32, about in [0, 1].
  """
  height, width = resized(image.shape[0], image.shape[1], size)
  rounds = int if variant == "hf" else round  # int rounds down here
  top, left = (corner(n, size, rounds=rounds) for n in (height, width))
  if variant in ("pil", "hf"):
    large = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large)[top : top + size, left : left + size]
  taps = _antialiased_taps if variant == "tensor_aa" else _plain_taps
  rows = _interpolation(image.shape[0], height, taps)[top : top + size]
  columns = _interpolation(image.shape[1], width, taps)[left : left + size]
  unit = image.astype(np.float32) / np.float32(255)
  tall = (rows @ unit.reshape(len(unit), -1)).reshape(size, -1, 3)
  wide = columns @ np.ascontiguousarray(tall.swapaxes(0, 1)).reshape(-1, size * 3)
  return np.ascontiguousarray(wide.reshape(size, size, 3).swapaxes(0, 1))


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Evaluates Keys's cubic convolution kernel (1981) with the parameter `a`."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _antialiased_taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns weights and input positions, each [after, taps]; the kernel widens with the scale.

  Taps beyond the edge are left out.
  """
  scale = before / after
  centers = (np.arange(after)[:, None] + 0.5) * scale
  reach = 2 * max(scale, 1.0)
  places = np.floor(centers - reach) + np.arange(int(2 * reach) + 2)
  weights = _cubic((places + 0.5 - centers) / max(scale, 1.0), -0.5)
  weights *= (places >= 0) & (places < before)
  weights /= weights.sum(axis=1, keepdims=True)
  return weights, np.clip(places, 0, before - 1)


def _plain_taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns weights and input positions, each [after, 4]; PyTorch's kernel without antialias.

  Taps beyond the edge repeat the pixel at the edge.
  """
  centers = (np.arange(after)[:, None] + 0.5) * (before / after) - 0.5
  places = np.floor(centers) + np.arange(-1, 3)
  return _cubic(places - centers, -0.75), np.clip(places, 0, before - 1)


def _interpolation(before: int, after: int, taps: Callable) -> sparse.csr_array:
  """Returns the matrix [after, before] that resizes one axis, float32."""
  weights, places = taps(before, after)
  rows = np.broadcast_to(np.arange(after)[:, None], weights.shape)
  entries = (weights.ravel().astype(np.float32), (rows.ravel(), places.ravel().astype(int)))
  return sparse.coo_array(entries, shape=(after, before)).tocsr()


def resize_in_graph(images: jax.Array, size: int) -> jax.Array:
  """Resizes and crops images inside a program, differentiably, as 'tensor_aa' does.

  Args:
    images: float [N, H, W, 3] in [0, 1].
    size: S, in pixels.

  Returns:
    [N, S, S, 3].
  """
  count, *edges, channels = images.shape
  height, width = resized(edges[0], edges[1], size)
  if [height, width] != edges:
    shape = (count, height, width, channels)
    images = jax.image.resize(images, shape, "cubic", antialias=True)
  top, left = corner(height, size), corner(width, size)
  return images[:, top : top + size, left : left + size]


def normalize(pixels: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Normalizes the channels of images, uint8 or float in [0, 1], inside a program."""
  if pixels.dtype == jnp.uint8:
    pixels = pixels.astype(jnp.float32) / 255.0
  return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
