"""The shapes world's ranked lists: several images of a prompt, from best to worst.

What listwise methods learn from. Columns are those of HPDv2's test set (Wu et al. 2023,
https://arxiv.org/abs/2306.09341), `prompt` and `rank`, with the images as files beside them.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxpref.runtime import progress, tfds_store
from jaxpref.shapes import annotator, flaws, palette, prompts, render

_STREAM = 0x4C495354


@dataclasses.dataclass(eq=False)
class ListsConfig(tfds.core.BuilderConfig):
  """How many lists there are of train and of test prompts, their length, and their seed."""

  num_train: int = 1000
  num_test: int = 100
  num_images: int = 4
  seed: int = 0


class ShapesRankings(tfds_store.StoredBuilder):
  """Images of one prompt, and the order in which an annotator puts them."""

  SOURCES = (annotator, flaws, palette, prompts, render)

  def _info(self) -> tfds.core.DatasetInfo:
    columns: dict[str, Any] = {"prompt": tfds.features.Text()}
    for k in range(self.builder_config.num_images):
      columns[f"jpg_{k}"] = tfds.features.Tensor(shape=(), dtype=np.object_)
      columns[f"rank_{k}"] = np.int64
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(columns),
      disable_shuffling=True,  # row i is list i
    )

  def _generate_examples(self, split: str, num_lists: int) -> Iterator:
    config = self.builder_config
    for i in progress.progress_bar(
      range(num_lists), desc=f"drawing lists to {split} on", unit="list"
    ):
      yield i, draw_list(i, config.num_images, split=split, seed=config.seed)


def draw_list(i: int, num_images: int, *, split: str, seed: int) -> dict[str, Any]:
  """Row `i` of a split, a function of these arguments alone; rank 1 is the best."""
  rng = tfds_store.rng_of(seed, _STREAM, split, i)
  spec = prompts.draw_prompt(rng, split)
  row: dict[str, Any] = {"prompt": prompts.caption(spec)}
  utilities = []
  for k in range(num_images):
    image, befallen = flaws.corpus_image(spec, rng)
    utilities.append(annotator.utility(befallen, spec))
    row[f"jpg_{k}"] = tfds_store.to_png(image)
  for place, k in enumerate(annotator.rank(utilities, rng), start=1):
    row[f"rank_{k}"] = place
  return row


def load_rankings(
  split: str, num_images: int, *, data_dir: str | os.PathLike | None = None
) -> Any:
  """The lists of `num_images` images of a split, drawn and written first if need be.

  Raises:
    UserError: the directory cannot be written, or is not on this machine.
    ValueError: there is no such split.
  """
  config = ListsConfig(name=f"of-{num_images}", num_images=num_images)
  return tfds_store.load(ShapesRankings, config, split, data_dir=data_dir)
