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
  """Chooses prompts at random, and those with the largest losses and gains of any model.

  Args:
    flags: of the program.
    rows: of scores.
    images: that all models have, see `score_table.list_images`.
    results: from `comparisons.compare_all`.

  Returns:
    Examples for `models_report.write`: the first image of each prompt. The prompt with the
    largest loss of any model by the first scorer comes first, and so on.
  """
  first = images.groupby("prompt_id")["seed"].min().to_dict()
  order = np.random.default_rng(flags.seed).permutation(sorted(first))
  at_random = [int(i) for i in order[: flags.examples]]
  chosen, worst = list(at_random), {}
  keys = models_report.order_scorers(results)
  is_first = [first.get(p) == s for p, s in zip(rows["prompt_id"], rows["seed"], strict=True)]
  table = rows[np.array(is_first, bool)]
  table = table.assign(key=table["scorer"] + "-" + table["version"]).dropna(subset="score")
  if keys:
    changes = _changes(table[table["key"] == keys[0]], results)
    for model in changes:
      change = changes[model].dropna().sort_values()
      chosen += [int(i) for i in [*change.index[:_EXTREMES], *change.index[::-1][:_EXTREMES]]]
    worst = changes.min(axis=1).dropna().to_dict()
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
      "at_random": i in at_random,
      "images": {name: files[name, i, first[i]] for name in results["models"]},
      "scores": {
        key: {
          name: scores[i, key, name] for name in results["models"] if (i, key, name) in scores
        }
        for key in keys
      },
    }
    for i in sorted(dict.fromkeys(chosen), key=lambda i: worst.get(i, np.inf))
  ]


def _changes(judged: pd.DataFrame, results: Mapping[str, Any]) -> pd.DataFrame:
  """Returns score minus the baseline's by prompt and other model; NaN where one is missing."""
  baseline = results["baseline"]
  wide = judged.pivot(index="prompt_id", columns="model", values="score")
  wide = wide.reindex(columns=list(results["models"]))
  return wide.drop(columns=baseline).sub(wide[baseline], axis=0)
