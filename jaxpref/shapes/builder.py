"""The shapes world's preferences as a tensorflow_datasets builder, without TensorFlow.

`load_preferences("train")` draws the pairs on first use, writes them as ArrayRecord into
the user's TFDS directory, and reads them back from then on. Columns are those of
Pick-a-Pic v2 (Kirstain et al. 2023, https://arxiv.org/abs/2305.01569), and the scores that
experts are picked by. `jpg_0` and `jpg_1` are images as files, here PNG: no loss.
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

_STREAM = 0x50414952  # keeps pairs' random numbers apart from those of the corpus
_EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(eq=False)
class PairsConfig(tfds.core.BuilderConfig):
  """How many pairs there are of train and of test prompts, and their seed."""

  num_train: int = 3000
  num_test: int = 300
  seed: int = 0


class ShapesPreferences(tfds_store.StoredBuilder):
  """Pairs of images of one prompt, and which of the two an annotator prefers."""

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
      range(num_pairs), desc=f"drawing pairs to {split} on", unit="pair"
    ):
      row = draw_pair(i, split=split, seed=seed)
      yield i, {**row, "num_example_per_prompt": copies[row["caption"]]}


def draw_pair(i: int, *, split: str, seed: int) -> dict[str, Any]:
  """Row `i` of a split, a function of these arguments alone.

  Only `num_example_per_prompt` is missing, which takes the whole split to count.
  `best_image_uid` is empty where the annotator calls a tie, as are the URLs.
  """
  rng = tfds_store.rng_of(seed, _STREAM, split, i)
  spec = prompts.draw_prompt(rng, split)
  row: dict[str, Any] = {
    "are_different": True,  # no two images are alike
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
  """The pairs of a split; drawn and written first if they are not there yet.

  Safe to call from several processes at once: one writes, the others wait.

  Args:
    split: 'train' or 'test', the split of the prompts.
    num_train: pairs of train prompts.
    num_test: pairs of test prompts.
    seed: of everything in the pairs.
    data_dir: the TFDS directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    A random-access source of rows (`len`, `[i]`), columns to values, text as bytes.

  Raises:
    UserError: the directory cannot be written, or is not on this machine.
    ValueError: there is no such split.
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
