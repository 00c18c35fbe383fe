"""The parts that families of neural scorers share.

Importing this package is cheap. JAX, the models and their weights are loaded by the first call
of a scorer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpref.scorers import Entry, Images, Reward

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Published:
  """Weights as they are published.

  Attributes:
    name: of their directory below the scorers' directory, "<family>.<name>".
    where: the repository, for messages.
    file: the published file, if it has to be converted; else ''.
    hub: id of a repository on the Hugging Face Hub with safetensors; else ''.
    sha256: of `file`, or '' if it is not known.
  """

  name: str
  where: str
  file: str = ""
  hub: str = ""
  sha256: str = ""


def version_of(number: str, variant: str, dtype: str) -> str:
  """Returns a version: a number, the preprocessing and, unless it is float32, the dtype."""
  return "-".join([number, variant] + ([dtype] if dtype != "float32" else []))


@dataclasses.dataclass(frozen=True)
class Cosine:
  """A scorer that is the cosine between CLIP's features of an image and of its prompt.

  Attributes:
    published: its weights.
    number: the first part of its version.
    towers: name of its configuration in `jaxpref.models.clip_towers`: 'H14' or 'L14'.
    cleaning: of texts before byte-pair encoding: 'ftfy', as in open_clip, or 'fast', as in
      transformers' fast tokenizer.
    scale: factor of the cosine; None is the model's own, exp(logit_scale).
  """

  published: Published
  number: str
  towers: str
  cleaning: str
  scale: float | None = 100.0

  def entry(self, variant: str, dtype: str = "float32") -> Entry:
    """Makes the entry of `SCORERS`.

    Args:
      variant: the preprocessing, see `jaxpref.scorers.base.pixels`.
      dtype: of weights and computation, one of `DTYPES`.
    """

    def score(images, prompts):
      from jaxpref.scorers.base import clip_scores  # noqa: PLC0415  # imports JAX

      return clip_scores.score(self, images, prompts, variant=variant, dtype=dtype)

    return version_of(self.number, variant, dtype), score

  def find_files(self) -> None:
    """Finds the weights and CLIP's vocabulary: the entry of `FILES`."""
    from jaxpref.scorers.base import store  # noqa: PLC0415  # imports JAX

    store.find_clip_vocabulary(store.find_weights(self.published), cleaning=self.cleaning)

  def features(self, variant: str) -> Callable[[Images], np.ndarray]:
    """Makes the entry of `FEATURES`: CLIP's features of images, of length 1.

    Args:
      variant: as for `entry`.
    """

    def features(images):
      from jaxpref.scorers.base import clip_scores, pixels  # noqa: PLC0415  # imports JAX

      pixels.check_images(images, [""] * len(images))
      loaded = clip_scores.load_clip(self, "float32")
      if not len(images):
        return np.zeros((0, loaded.module.config.projection_dim), np.float32)
      return clip_scores.image_features(loaded, images, variant)

    return features

  def reward(self, dtype: Any) -> Reward:
    """Makes the entry of `REWARDS`; see `jaxpref.scorers.load_reward`."""
    from jaxpref.scorers.base import clip_scores  # noqa: PLC0415  # imports JAX

    return clip_scores.reward(self, dtype)
