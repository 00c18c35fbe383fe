"""Diversity of models' images: of each prompt's images, and of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from jaxpref.evaluation import comparisons, score_rows, vendi

VERSION = "1"
_SIDE = 32  # pixels
_OF_IMAGES = ["model", "prompt_id", "seed", "prompt", "category"]
_MEASURES = {"vendi": vendi.vendi_score, "distance": vendi.mean_distance}


def pixel_features(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
  """Returns the pixels of images resized to 32 x 32, [N, 3073].

  The last column is 1 for black images and 0 for all others. A black image has no direction
  otherwise; so it equals other black images and is orthogonal to the rest.

  Args:
    images: uint8 [H, W, 3] each.
  """
  small = [
    np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
    for image in images
  ]
  pixels = np.stack(small).reshape(len(small), -1).astype(np.float32)
  return np.concatenate([pixels, ~pixels.any(axis=1, keepdims=True)], axis=1)


def prompt_rows(features: np.ndarray, images: pd.DataFrame, *, name: str) -> pd.DataFrame:
  """Measures the diversity of the images of each model and prompt.

  Args:
    features: of each image, [N, d].
    images: the images' `model, prompt_id, seed, prompt, category`, one row each, in the order
      of `features`. Images of prompts with the same text are measured together.
    name: of the features, such as "pixels".

  Returns:
    Rows with the columns `score_rows.COLUMNS`, one for each model, prompt and measure: the
    scorers "vendi.<name>" and "distance.<name>". Prompts with one image have no rows.

  Raises:
    ValueError: the images are not those of the features, models have different numbers of
      images of a prompt, or a feature cannot be used.
  """
  images = _checked(features, images)
  counts = images.groupby(["unit", "model"]).size().unstack(fill_value=0)
  uneven = counts[counts.nunique(axis=1) > 1]
  if len(uneven):
    got = ", ".join(f"{model} {n}" for model, n in uneven.iloc[0].items())
    raise ValueError(f"models need equally many images of prompt {uneven.index[0]} (got {got})")
  rows = []
  for (model, unit), of in images.groupby(["model", "unit"], sort=False):
    if len(of) < 2:
      continue
    first = of.iloc[0]
    for measure, function in _MEASURES.items():
      score = function(features[of["place"]])
      where = (model, unit, 0, first["prompt"], first["category"])
      rows.append((*where, f"{measure}.{name}", VERSION, score))
  return pd.DataFrame(rows, columns=list(score_rows.COLUMNS))


def compare_diversity(
  features: np.ndarray,
  images: pd.DataFrame,
  *,
  name: str,
  baseline: str,
  models: Sequence[str] | None = None,
  seed: int = 0,
  resamples: int = 10_000,
  groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Measures the diversity of each model's images and compares it by prompt.

  Args:
    features: as for `prompt_rows`.
    images: as for `prompt_rows`.
    name: of the features.
    baseline: as for `comparisons.compare_all`.
    models: as for `comparisons.compare_all`.
    seed: as for `comparisons.compare_all`.
    resamples: as for `comparisons.compare_all`.
    groups: as for `comparisons.compare_all`.

  Returns:
    Plain JSON values:
      features: `name`.
      overall: model -> `vendi`, `distance` (None for one image) and `images` (their number),
        over the images of all prompts.
      by_prompt: the rows of `prompt_rows`, compared by `comparisons.compare_all`. Its `models`
        have the means over prompts. None if no prompt has two images.

  Raises:
    ValueError: as in `prompt_rows` and `comparisons.compare_all`, or models have different
      numbers of images.
  """
  rows = prompt_rows(features, images, name=name)
  images = _checked(features, images)
  overall = {}
  for model, of in images.groupby("model", sort=False):
    chosen = features[of["place"]]
    overall[str(model)] = {
      "distance": vendi.mean_distance(chosen) if len(chosen) > 1 else None,
      "images": len(chosen),
      "vendi": vendi.vendi_score(chosen),
    }
  by_prompt = None
  if len(rows):
    by_prompt = comparisons.compare_all(
      rows, baseline=baseline, models=models, seed=seed, resamples=resamples, groups=groups
    )
  return {"by_prompt": by_prompt, "features": name, "overall": overall}


def is_diversity(value: Any) -> bool:
  """Checks whether a value has the structure of the results of `compare_diversity`."""
  try:
    keys = {f"{measure}.{value['features']}-{VERSION}" for measure in _MEASURES}
    by_prompt = value["by_prompt"]
    if not all(
      isinstance(of["vendi"], int | float) and isinstance(of["distance"], int | float | None)
      for of in value["overall"].values()
    ):
      return False
    return by_prompt is None or (
      comparisons.are_comparisons(by_prompt)
      and value["overall"].keys() <= by_prompt["models"].keys()
      and all(keys <= of.keys() for of in by_prompt["models"].values())
      and all("holm" in one["scorers"][k] for one in by_prompt["comparisons"] for k in keys)
    )
  except (AttributeError, KeyError, TypeError):
    return False


def _checked(features: np.ndarray, images: pd.DataFrame) -> pd.DataFrame:
  """Returns the images with their `place` among the features and their `unit`."""
  missing = [column for column in _OF_IMAGES if column not in images.columns]
  if missing:
    raise ValueError(f"images lack the columns {', '.join(missing)}")
  if len(features) != len(images):
    raise ValueError(f"{len(images)} images have {len(features)} rows of features")
  twice = images[images.duplicated(["model", "prompt_id", "seed"])]
  if len(twice):
    model, prompt, seed = twice.iloc[0][["model", "prompt_id", "seed"]]
    raise ValueError(f"the image of model {model}, prompt {prompt}, seed {seed} occurs twice")
  unit = images.groupby("prompt", dropna=False)["prompt_id"].transform("min")
  return images.assign(place=np.arange(len(images)), unit=unit)
