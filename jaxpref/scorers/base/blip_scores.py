"""Scores of ImageReward, on this process's devices."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import BertTokenizer

from jaxpref.errors import UserError
from jaxpref.models import blip
from jaxpref.models.clip_towers import MEAN, STD
from jaxpref.scorers import Images, Reward
from jaxpref.scorers.base import Published, batches, pixels, store

_TOKENS = 35  # with [CLS] and [SEP]; longer prompts lose their end
_LONGEST = 20_000  # characters of a prompt that are tokenized; 35 tokens come from far fewer


@dataclasses.dataclass(frozen=True)
class Loaded:
  """ImageReward.

  Attributes:
    module: from `blip.build_image_reward`.
    params: its parameters.
    directory: its files.
  """

  module: blip.ImageReward
  params: Any
  directory: Path

  @property
  def image_size(self) -> int:
    """Height and width of the images that it takes."""
    return self.module.config.vision_config.image_size

  def apply(self, params: Any, images: jax.Array, tokens: Any) -> jax.Array:
    """Computes scores in a program, of images of the right size, uint8 or float in [0, 1]."""
    with batches.precision(self.module.dtype):
      units = pixels.normalize(images, MEAN, STD)
      scores: Any = self.module.apply({"params": params}, units, tokens["ids"], tokens["mask"])
    return scores

  @functools.cached_property
  def program(self) -> Any:
    """Returns `apply` for a batch, jitted."""
    return jax.jit(lambda params, batch: self.apply(params, batch["images"], batch["tokens"]))


def read(published: Published, dtype: Any) -> Loaded:
  """Reads the model; its parameters are numpy arrays.

  Raises:
    UserError: files are missing, or do not fit the configuration.
  """
  directory = store.find_weights(published)
  module = store.build_module(directory, blip.IMAGE_REWARD, blip.build_image_reward, dtype)
  abstract = blip.abstract_params(module)
  params = store.read_params(
    directory, abstract, ignored=lambda name: name.startswith(blip.UNUSED)
  )
  return Loaded(module, params, directory)


@functools.cache
def _load(published: Published, dtype: str, root: Path) -> Loaded:
  """Reads the model onto the devices, once; `root` makes another directory another model."""
  del root
  return batches.on_devices(read(published, dtype))


def tokenize(loaded: Loaded, prompts: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns token ids and their mask, int32 [N, 35] each, by 'ids' and 'mask'."""
  directory = store.find_bert_vocabulary(loaded.directory)
  tokenizer = _tokenizer(directory, loaded.module.config.text_config.vocab_size)
  found = tokenizer(
    [prompt[:_LONGEST] for prompt in prompts],
    padding="max_length",
    truncation=True,
    max_length=_TOKENS,
  )
  return {
    "ids": np.asarray(found["input_ids"], np.int32),
    "mask": np.asarray(found["attention_mask"], np.int32),
  }


@functools.cache
def _tokenizer(directory: Path, words: int) -> BertTokenizer:
  try:
    tokenizer = BertTokenizer(str(directory / "vocab.txt"), do_lower_case=True)
  except (OSError, ValueError) as error:
    raise UserError(f"{directory}/vocab.txt cannot be read: {error}") from error
  # BLIP's additions to the vocabulary; the text still begins with [CLS].
  tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
  if len(tokenizer) != words:
    raise UserError(
      f"{directory}/vocab.txt has {len(tokenizer) - 2} words; the text encoder's vocabulary is "
      f"that of BERT uncased, {words - 2}"
    )
  return tokenizer


def score(
  published: Published, images: Images, prompts: Sequence[str], *, dtype: str
) -> np.ndarray:
  """Scores images, float32 [N].

  Args:
    published: the weights.
    images: uint8 [N, H, W, 3], or N images of different sizes.
    prompts: of the images, N.
    dtype: of the computation.

  Raises:
    UserError: the input is wrong, or files are missing or do not fit.
  """
  pixels.check_images(images, prompts)
  if not len(images):
    return np.zeros(0, np.float32)
  loaded = _load(published, dtype, store.directory_of(published.name))
  tokens = tokenize(loaded, prompts)
  make_images = batches.image_maker(images, "pil", loaded.image_size)

  def make(part: slice) -> dict[str, Any]:
    return {"images": make_images(part), "tokens": {k: v[part] for k, v in tokens.items()}}

  return batches.run(loaded.program, loaded.params, len(images), make)


def reward(published: Published, dtype: Any) -> Reward:
  """Loads the scorer as a differentiable function; see `jaxpref.scorers.load_reward`."""
  loaded = read(published, dtype)

  def score_in_graph(params, images, tokens):
    return loaded.apply(params, pixels.resize_in_graph(images, loaded.image_size), tokens)

  return Reward(loaded.params, lambda prompts: tokenize(loaded, prompts), score_in_graph)
