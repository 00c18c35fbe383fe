"""Scores and features from CLIP models, on this process's devices."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.errors import UserError
from jaxpref.models import clip_towers, text
from jaxpref.scorers import Images, Reward
from jaxpref.scorers.base import Cosine, batches, pixels, store


@dataclasses.dataclass(frozen=True)
class Clip:
  """A CLIP model.

  Attributes:
    module: from `clip_towers.build_clip`.
    params: its parameters.
    directory: its files.
  """

  module: Any
  params: Any
  directory: Path

  @property
  def image_size(self) -> int:
    """Height and width of the images that it takes."""
    return self.module.config.vision_config.image_size

  def scale(self, factor: float | None) -> Any:
    """Returns `factor`; for None the model's own factor of cosines."""
    return jnp.exp(self.params["logit_scale"]) if factor is None else factor

  def features_in_graph(self, params: Any, images: jax.Array) -> jax.Array:
    """Computes features of images of any size, float in [0, 1], inside a program."""
    with batches.precision(self.module.dtype):
      small = pixels.resize_in_graph(images, self.image_size)
      units = pixels.normalize(small, clip_towers.MEAN, clip_towers.STD)
      return clip_towers.image_features(self.module, params, units, remat=True)

  @functools.cached_property
  def of_images(self) -> Any:
    """Returns the jitted function of images: (params, uint8 or float images) -> features."""

    def features(params, images):
      with batches.precision(self.module.dtype):
        units = pixels.normalize(images, clip_towers.MEAN, clip_towers.STD)
        return clip_towers.image_features(self.module, params, units)

    return jax.jit(features)

  @functools.cached_property
  def of_texts(self) -> Any:
    """Returns the jitted function of texts: (params, ids) -> features."""

    def features(params, ids):
      with batches.precision(self.module.dtype):
        return clip_towers.text_features(self.module, params, ids)

    return jax.jit(features)


def read_clip(scorer: Cosine, dtype: Any) -> Clip:
  """Reads a scorer's model; its parameters are numpy arrays.

  Raises:
    UserError: files are missing, or do not fit the configuration.
  """
  directory = store.find_weights(scorer.published)
  default = getattr(clip_towers, scorer.towers)
  module = store.build_module(directory, default, clip_towers.build_clip, dtype)
  abstract = clip_towers.abstract_clip(module)
  params = store.read_params(directory, abstract, ignored=lambda n: n.endswith("position_ids"))
  return Clip(module, params, directory)


@functools.cache
def _load(scorer: Cosine, dtype: str, root: Path) -> Clip:
  """Reads a model and puts it on the devices; `root` makes another directory another model."""
  del root
  return batches.on_devices(read_clip(scorer, dtype))


def load_clip(scorer: Cosine, dtype: str) -> Clip:
  """Returns a scorer's model on the devices of `batches.local_mesh`; reads it once.

  Raises:
    UserError: files are missing, or do not fit the configuration.
  """
  return _load(scorer, dtype, store.directory_of(scorer.published.name))


def image_features(clip: Clip, images: Images, variant: str) -> np.ndarray:
  """Computes features of images, float32 [N, D] of length 1.

  Args:
    clip: from `load_clip`.
    images: uint8 [H, W, 3] each.
    variant: of the preprocessing, see `pixels`.
  """
  make = batches.image_maker(images, variant, clip.image_size)
  return batches.run(clip.of_images, clip.params, len(images), make)


def text_features(clip: Clip, prompts: Sequence[str], cleaning: str) -> np.ndarray:
  """Computes features of prompts, float32 [N, D] of length 1; repeated prompts once."""
  unique = list(dict.fromkeys(prompts))
  ids = tokenize(clip, unique, cleaning)
  found = batches.run(clip.of_texts, clip.params, len(unique), lambda part: ids[part])
  place = {prompt: i for i, prompt in enumerate(unique)}
  return found[[place[prompt] for prompt in prompts]]


def tokenize(clip: Clip, prompts: Sequence[str], cleaning: str) -> np.ndarray:
  """Returns token ids of prompts, int32 [N, L]; see `Cosine` for `cleaning`."""
  directory = store.find_clip_vocabulary(clip.directory, cleaning=cleaning)
  words = clip.module.config.text_config.vocab_size
  return text.tokenize([load_tokenizer(directory, cleaning, words)], prompts)[0]


@functools.cache
def load_tokenizer(directory: Path, cleaning: str, words: int) -> Any:
  """Reads CLIP's tokenizer, once.

  Args:
    directory: with its files.
    cleaning: see `Cosine`.
    words: size of the text encoder's vocabulary.

  Raises:
    UserError: it cannot be read, or has another number of words.
  """
  tokenizer = text.load_tokenizer(directory, fast=cleaning == "fast")
  if len(tokenizer) != words:
    raise UserError(
      f"the vocabulary in {directory} has {len(tokenizer)} words, but the text encoder {words}"
    )
  return tokenizer


def score(
  scorer: Cosine,
  images: Images,
  prompts: Sequence[str],
  *,
  variant: str,
  dtype: str,
) -> np.ndarray:
  """Scores images: scale * cosine, float32 [N].

  Args:
    scorer: says which model, how texts are cleaned, and the scale.
    images: uint8 [N, H, W, 3], or N images of different sizes.
    prompts: of the images, N.
    variant: of the preprocessing, see `pixels`.
    dtype: of the computation.

  Raises:
    UserError: the input is wrong, or files are missing or do not fit.
  """
  pixels.check_images(images, prompts)
  if not len(images):
    return np.zeros(0, np.float32)
  clip = load_clip(scorer, dtype)
  of_images = image_features(clip, images, variant)
  of_texts = text_features(clip, prompts, scorer.cleaning)
  cosines = np.einsum("nd,nd->n", of_images, of_texts, dtype=np.float64)
  return (float(clip.scale(scorer.scale)) * cosines).astype(np.float32)


def reward(scorer: Cosine, dtype: Any) -> Reward:
  """Loads a scorer as a differentiable function; see `jaxpref.scorers.load_reward`."""
  read = read_clip(scorer, dtype)
  clip = dataclasses.replace(read, params=None)  # what the functions keep

  def score_in_graph(params, images, ids):
    of_images = clip.features_in_graph(params, images)
    with batches.precision(dtype):
      of_texts = clip_towers.text_features(clip.module, params, ids)
    scale = dataclasses.replace(clip, params=params).scale(scorer.scale)
    return scale * jnp.sum(of_images * of_texts, axis=-1)

  return Reward(
    read.params, lambda prompts: tokenize(clip, prompts, scorer.cleaning), score_in_graph
  )
