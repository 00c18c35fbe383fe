"""Scores of the shapes world's preference model, which ships with the package."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref.models import preference_towers, text
from jaxpref.models.preference_towers import Towers
from jaxpref.scorers import Images, Reward
from jaxpref.scorers.base import batches, pixels, store

BUNDLED = Path(__file__).parents[1] / "bundled" / "shapes.preference"
VARIANT = "pil"  # of the preprocessing, see `pixels`


@dataclasses.dataclass(frozen=True)
class Preference:
  """A preference model.

  Attributes:
    towers: its modules.
    params: their parameters, float32.
    tokenizer: of its prompts.
  """

  towers: Towers
  params: Any
  tokenizer: Any

  @functools.cached_property
  def program(self) -> Any:
    """Returns the jitted function (params, (uint8 images, ids)) -> scores."""
    return jax.jit(
      lambda params, batch: _score(
        self.towers, params, batch[0].astype(jnp.float32) / 255.0, batch[1]
      )
    )


def read_preference(directory: Path, dtype: Any = "float32") -> Preference:
  """Reads a model that `python -m jaxpref.pretrain` has written; its arrays are numpy's.

  Args:
    directory: with `config.json`, `model.safetensors` and the tokenizer's files.
    dtype: of the computation.

  Raises:
    UserError: files are missing, or do not fit the configuration.
  """
  towers = preference_towers.build_towers(store.read_config(directory, {}), dtype=dtype)
  abstract = preference_towers.abstract_towers(towers)
  params = store.read_params(directory, abstract, ignored=lambda name: False)
  return Preference(towers, params, text.load_tokenizer(directory))


@functools.cache
def load_preference() -> Preference:
  """Returns the bundled model on the devices of `batches.local_mesh`; reads it once."""
  return batches.on_devices(read_preference(BUNDLED))


def score(model: Preference, images: Images, prompts: Sequence[str]) -> np.ndarray:
  """Scores images: exp(logit scale) * cosine, float32 [N].

  Args:
    model: with parameters on the devices.
    images: uint8 [N, H, W, 3], or N images of different sizes.
    prompts: of the images, N.

  Raises:
    UserError: the input is wrong.
  """
  pixels.check_images(images, prompts)
  if not len(images):
    return np.zeros(0, np.float32)
  small = batches.image_maker(images, VARIANT, model.towers.image_size)
  ids = text.tokenize([model.tokenizer], prompts)[0]
  rows = len(images)
  return batches.run(model.program, model.params, rows, lambda p: (small(p), ids[p]))


def reward(dtype: Any) -> Reward:
  """Loads the bundled model as a differentiable function; see `scorers.load_reward`."""
  model = read_preference(BUNDLED, dtype)
  towers, tokenizer = model.towers, model.tokenizer  # what the functions keep

  def score_in_graph(params, images, ids):
    return _score(towers, params, pixels.resize_in_graph(images, towers.image_size), ids)

  return Reward(
    model.params, lambda prompts: text.tokenize([tokenizer], prompts)[0], score_in_graph
  )


def _score(towers: Towers, params: Any, images: jax.Array, ids: jax.Array) -> jax.Array:
  """Scores float images [B, S, S, 3] in [0, 1]: the margin of two is the preference's logit."""
  with batches.precision(towers.image.dtype):
    units = (images - preference_towers.MEAN) / preference_towers.STD
    of_images = preference_towers.image_features(towers, params, units)
    of_texts = preference_towers.text_features(towers, params, ids)
  return jnp.exp(params["logit_scale"]) * jnp.sum(of_images * of_texts, axis=-1)
