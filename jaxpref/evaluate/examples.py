"""The prompts whose images the report shows."""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from jaxpref.evaluation import models_report

_EXTREMES = 8  # prompts with the largest gains, and as many with the largest losses


def choose(
  flags: argparse.Namespace,
  rows: pd.DataFrame,
  images: pd.DataFrame,
  results: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """Chooses prompts at random, then those with the largest losses and gains of any model.

  Args:
    flags: of the program.
    rows: of scores.
    images: that all models have, see `score_table.list_images`.
    results: from `comparisons.compare_all`.

  Returns:
    Examples for `models_report.write`: the first image of each prompt.
  """
  first = images.groupby("prompt_id")["seed"].min().to_dict()
  order = np.random.default_rng(flags.seed).permutation(sorted(first))
  chosen = [int(i) for i in order[: flags.examples]]
  keys = models_report.order_scorers(results)
  is_first = [first.get(p) == s for p, s in zip(rows["prompt_id"], rows["seed"], strict=True)]
  table = rows[np.array(is_first, bool)]
  table = table.assign(key=table["scorer"] + "-" + table["version"]).dropna(subset="score")
  if keys:
    judged = table[table["key"] == keys[0]]
    wide = judged.pivot(index="prompt_id", columns="model", values="score")
    for model in wide.columns.drop(results["baseline"]):
      change = (wide[model] - wide[results["baseline"]]).dropna().sort_values()
      chosen += [int(i) for i in [*change.index[:_EXTREMES], *change.index[::-1][:_EXTREMES]]]
  scores = {
    (int(p), str(key), str(model)): float(score)
    for p, key, model, score in zip(
      table["prompt_id"], table["key"], table["model"], table["score"], strict=True
    )
  }
  files = {
    (str(model), int(p), int(seed)): file
    for model, p, seed, file in zip(
      images["model"], images["prompt_id"], images["seed"], images["file"], strict=True
    )
  }
  about = images.drop_duplicates("prompt_id").set_index("prompt_id")
  return [
    {
      "prompt": about.loc[i, "prompt"],
      "category": about.loc[i, "category"],
      "seed": int(first[i]),
      "images": {name: files[name, i, first[i]] for name in results["models"]},
      "scores": {
        key: {
          name: scores[i, key, name] for name in results["models"] if (i, key, name) in scores
        }
        for key in keys
      },
    }
    for i in dict.fromkeys(chosen)
  ]
