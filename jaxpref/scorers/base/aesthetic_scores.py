"""LAION's aesthetic heads on features of CLIP-L."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.scorers import Images, Reward
from jaxpref.scorers.base import Cosine, Published, batches, clip_scores, pixels, store

# Version 2's layers and their outputs; numbers in the names count dropouts too.
_LAYERS = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}


def abstract_head(name: str, width: int) -> dict[str, Any]:
  """Returns the shapes of a head's parameters, float32.

  Args:
    name: of the weights, 'aesthetic.v1' or 'aesthetic.v2'.
    width: of the features.
  """

  def dense(before: int, after: int) -> dict[str, Any]:
    shapes = {"kernel": (before, after), "bias": (after,)}
    return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}

  if name == "aesthetic.v1":
    return dense(width, 1)
  widths = [width, *_LAYERS.values()]
  return {n: dense(*widths[i : i + 2]) for i, n in enumerate(_LAYERS)}


def apply_head(params: Any, features: Any) -> Any:
  """Computes scores [B] of normalized features [B, D], as numpy or JAX arrays."""
  for layer in [params] if "kernel" in params else [params[name] for name in _LAYERS]:
    features = features @ layer["kernel"] + layer["bias"]
  return features[:, 0]


def _read_head(published: Published, width: int) -> Any:
  directory = store.find_weights(published)
  abstract = abstract_head(published.name, width)
  return store.read_params(directory, abstract, ignored=lambda name: False)


@functools.cache
def _load_head(published: Published, width: int, root: Path) -> Any:
  """Reads a head, once; `root` makes another directory another head."""
  del root
  return _read_head(published, width)


def _width(loaded: clip_scores.Clip) -> int:
  return loaded.module.config.projection_dim


def score(
  published: Published,
  backbone: Cosine,
  images: Images,
  prompts: Sequence[str],
  *,
  variant: str,
  dtype: str,
) -> np.ndarray:
  """Scores images, float32 [N].

  Args:
    published: the head's weights.
    backbone: the scorer whose CLIP model computes the features.
    images: uint8 [N, H, W, 3], or N images of different sizes.
    prompts: of the images, N; they do not matter.
    variant: of the preprocessing, see `pixels`.
    dtype: of CLIP's computation.

  Raises:
    UserError: the input is wrong, or files are missing or do not fit.
  """
  pixels.check_images(images, prompts)
  if not len(images):
    return np.zeros(0, np.float32)
  loaded = clip_scores.load_clip(backbone, dtype)
  head = _load_head(published, _width(loaded), store.directory_of(published.name))
  return apply_head(head, clip_scores.image_features(loaded, images, variant))


def reward(published: Published, backbone: Cosine, dtype: Any) -> Reward:
  """Loads a scorer as a differentiable function; see `jaxpref.scorers.load_reward`."""
  loaded = clip_scores.read_clip(backbone, dtype)
  params = {"clip": loaded.params, "head": _read_head(published, _width(loaded))}

  def score_in_graph(params, images, tokens):
    del tokens
    features = loaded.features_in_graph(params["clip"], images)
    with batches.precision("float32"):
      return apply_head(params["head"], features)

  return Reward(params, lambda prompts: np.zeros((len(prompts), 0), np.int32), score_in_graph)
