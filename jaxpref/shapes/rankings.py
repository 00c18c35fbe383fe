"""The shapes world's data set of ranked lists: several images of a prompt with their ranks.

Listwise methods learn from it. The columns are those of HPDv2's test set (Wu et al. 2023,
https://arxiv.org/abs/2306.09341), `prompt` and `rank`, and the images as PNG files.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxpref.runtime import progress, tfds_store
from jaxpref.shapes import annotator, flaws, palette, prompts, render

_STREAM = 0x4C495354  # separates the lists' random numbers from those of the pairs


@dataclasses.dataclass(eq=False)
class ListsConfig(tfds.core.BuilderConfig):
  """The numbers of lists of train and of test prompts, their length, and the seed."""

  num_train: int = 1000
  num_test: int = 100
  num_images: int = 4
  seed: int = 0


class ShapesRankings(tfds_store.StoredBuilder):
  """Lists of images of one prompt with the annotator's ranks."""

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
      range(num_lists), desc=f"generating the {split} lists", unit="list"
    ):
      yield i, draw_list(i, config.num_images, split=split, seed=config.seed)


def draw_list(i: int, num_images: int, *, split: str, seed: int) -> dict[str, Any]:
  """Generates row `i` of a split, which depends only on these arguments; rank 1 is best."""
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
  """Opens the ranked lists of a split; generates and stores the data set first if necessary.

  Args:
    split: 'train' or 'test', the split of the prompts.
    num_images: number of images per list.
    data_dir: the TFDS directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UserError: the directory cannot be written, or is not a local path.
    ValueError: `split` is unknown.
  """
  config = ListsConfig(name=f"of-{num_images}", num_images=num_images)
  return tfds_store.load(ShapesRankings, config, split, data_dir=data_dir)
