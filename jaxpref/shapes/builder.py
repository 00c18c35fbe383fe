"""The shapes world's data set of preference pairs.

`load_preferences("train")` generates the pairs on first use and stores them in the user's TFDS
directory, see `jaxpref.runtime.tfds_store`. The columns are those of Pick-a-Pic v2 (Kirstain et
al. 2023, https://arxiv.org/abs/2305.01569) and the scores by which experts are chosen. `jpg_0`
and `jpg_1` are image files, here lossless PNG.
"""

import dataclasses
import datetime
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxpref.runtime import progress, tfds_store
from jaxpref.shapes import annotator, flaws, palette, prompts, render

_STREAM = 0x50414952  # separates the pairs' random numbers from those of the lists
_EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(eq=False)
class PairsConfig(tfds.core.BuilderConfig):
  """The numbers of pairs of train and of test prompts, and the seed."""

  num_train: int = 3000
  num_test: int = 300
  seed: int = 0


class ShapesPreferences(tfds_store.StoredBuilder):
  """Pairs of images of one prompt with the annotator's preference."""

  SOURCES = (annotator, flaws, palette, prompts, render)
  BUILDER_CONFIGS = [PairsConfig(name="default")]

  def _info(self) -> tfds.core.DatasetInfo:
    sides: dict[str, Any] = {
      "image_{}_uid": tfds.features.Text(),
      "image_{}_url": tfds.features.Text(),
      "jpg_{}": tfds.features.Tensor(shape=(), dtype=np.object_),
      "label_{}": np.float32,
      "model_{}": tfds.features.Text(),
      "score_{}": np.float32,
    }
    columns: dict[str, Any] = {
      "are_different": np.bool_,
      "best_image_uid": tfds.features.Text(),
      "caption": tfds.features.Text(),
      "created_at": tfds.features.Text(),
      "has_label": np.bool_,
      "num_example_per_prompt": np.int64,
      "ranking_id": np.int64,
      "user_id": np.int64,
      **{name.format(k): kind for name, kind in sides.items() for k in (0, 1)},
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(columns),
      disable_shuffling=True,  # row i is pair i
    )

  def _generate_examples(self, split: str, num_pairs: int) -> Iterator:
    seed = self.builder_config.seed
    drawn = (
      prompts.draw_prompt(tfds_store.rng_of(seed, _STREAM, split, i), split)
      for i in range(num_pairs)
    )
    copies = Counter(prompts.caption(spec) for spec in drawn)
    for i in progress.progress_bar(
      range(num_pairs), desc=f"generating the {split} pairs", unit="pair"
    ):
      row = draw_pair(i, split=split, seed=seed)
      yield i, {**row, "num_example_per_prompt": copies[row["caption"]]}


def draw_pair(i: int, *, split: str, seed: int) -> dict[str, Any]:
  """Generates row `i` of a split, which depends only on these arguments.

  The column `num_example_per_prompt` is missing, because it needs a count over the whole split.
  `best_image_uid` is empty for ties, and the URLs are always empty.
  """
  rng = tfds_store.rng_of(seed, _STREAM, split, i)
  spec = prompts.draw_prompt(rng, split)
  row: dict[str, Any] = {
    "are_different": True,  # no two images are equal
    "caption": prompts.caption(spec),
    "created_at": (_EPOCH + datetime.timedelta(minutes=i)).isoformat(),
    "has_label": True,
    "ranking_id": i,
    "user_id": 0,
  }
  utilities = []
  for k in (0, 1):
    image, befallen = flaws.corpus_image(spec, rng)
    utilities.append(annotator.utility(befallen, spec))
    uid = uuid.uuid5(uuid.NAMESPACE_OID, f"shapes/{seed}/{split}/{i}/{k}")
    row |= {
      f"image_{k}_uid": str(uid),
      f"image_{k}_url": "",
      f"jpg_{k}": tfds_store.to_png(image),
      f"model_{k}": "shapes/corpus",
      f"score_{k}": annotator.observed_score(utilities[k], rng),
    }
  label_0 = annotator.prefer(utilities[0], utilities[1], rng)
  best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"]}.get(label_0, "")
  return row | {"label_0": label_0, "label_1": 1 - label_0, "best_image_uid": best}


def load_preferences(
  split: str,
  *,
  num_train: int = 3000,
  num_test: int = 300,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
) -> Any:
  """Opens the pairs of a split; generates and stores the data set first if necessary.

  Safe to call from several processes at once: one writes, the others wait.

  Args:
    split: 'train' or 'test', the split of the prompts.
    num_train: number of pairs of train prompts.
    num_test: number of pairs of test prompts.
    seed: seed of all random numbers of the pairs.
    data_dir: the TFDS directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    A random-access sequence of rows, each a mapping from columns to values; text is bytes.

  Raises:
    UserError: the directory cannot be written, or is not a local path.
    ValueError: `split` is unknown.
  """
  config = _config(num_train, num_test, seed)
  return tfds_store.load(ShapesPreferences, config, split, data_dir=data_dir)


def _config(num_train: int, num_test: int, seed: int) -> PairsConfig:
  default = ShapesPreferences.BUILDER_CONFIGS[0]
  asked = (num_train, num_test, seed)
  if asked == (default.num_train, default.num_test, default.seed):
    return default
  return PairsConfig(
    name="{}-{}-{}".format(*asked), num_train=num_train, num_test=num_test, seed=seed
  )
