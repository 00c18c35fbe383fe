"""Comparisons of models by the scores of their images.

`score_rows` describes the rows. A pair is two models' images of one prompt and seed. Images of
one prompt are not independent, so all intervals and tests are over prompts.
"""

import json
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxpref.evaluation import paired_tests, score_rows
from jaxpref.evaluation.paired_tests import TOLERANCE
from jaxpref.runtime.workdir import write_bytes

_GENEVAL = ("single_object", "two_object", "counting", "colors", "position")
CATEGORIES = (*_GENEVAL, "color_attribution")
_SIDES = ["base", "tuned"]


def compare(
  rows: pd.DataFrame,
  *,
  baseline: str = "base",
  model: str = "tuned",
  unit: str = "image",
  seed: int = 0,
  resamples: int = 10_000,
  selected_by: Collection[str] = (),
  imported: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
  """Compares a model with a baseline, scorer by scorer.

  Args:
    rows: one score per row, with the columns `score_rows.COLUMNS`. Rows of other models are
      ignored.
    baseline: name of the model whose side is called "base" in the results.
    model: name of the model whose side is called "tuned".
    unit: values that win, tie or lose, see `score_rows.unit_values`: "image" compares pairs of
      images, all others compare one value per prompt.
    seed: seed of the bootstrap and of the permutation test, the same for each scorer, so that
      a scorer's numbers do not depend on the other scorers.
    resamples: number of bootstrap resamples and of random permutations.
    selected_by: keys ("<scorer>-<version>") or names of scorers that had a part in the
      training; they are flagged and do not count for verdicts.
    imported: keys or names of scorers whose scores may be missing or NaN. Such pairs are left
      out and counted; for other scorers they are an error.

  Returns:
    "<scorer>-<version>" -> plain JSON values, sorted by key. A number that does not exist is
    None, never NaN:
      unit: see above.
      base, tuned: mean, std (n - 1 in the denominator) and n over the compared values.
      win, tie, loss: rates over pairs for the tuned model; a tie is a difference of at most
        `TOLERANCE`.
      win_rate: win + tie / 2; interval: its 95 % bootstrap interval over prompts.
      wilson_interval: Wilson's interval of the win rate, as a check; only if each prompt has
        one pair, because images of one prompt are not independent.
      win_rate_decided: win / (win + loss), None if all pairs tie. It is more informative for
        binary scores, where most pairs tie.
      difference: mean of tuned - base; difference_interval: its 95 % bootstrap interval.
      p_value: paired t-test on the prompts' (mean) differences. Also wilcoxon, sign_test and
        permutation: p-values of three other tests of them, see `paired_tests`.
      holm: `p_value` adjusted for the number of scorers; None for scorers of `selected_by`.
      effect_size: Cohen's d_z of the prompts' differences.
      prompts: number of prompts with different texts; merged_prompts: number of prompts that
        repeat another prompt's text; dropped: number of pairs left out, see `imported`.
      binary: whether every score is 0 or 1.
      selected_training_data: see `selected_by`.
    With one prompt, intervals are [None, None] and p-values are None. A scorer of `imported`
    without any pair is left out.

  Raises:
    ValueError: a model has no rows, a pair has only one score, the unit is unknown, or for the
      reasons of `score_rows.check_rows`; the message names the row.
  """
  rows = score_rows.check_rows(rows, imported=imported)
  return compare_checked(
    *(rows, baseline, model),
    unit=unit,
    seed=seed,
    resamples=resamples,
    selected_by=selected_by,
    imported=imported,
  )


def compare_checked(
  rows: pd.DataFrame,
  baseline: str,
  model: str,
  *,
  unit: str,
  seed: int,
  resamples: int,
  selected_by: Collection[str],
  imported: Collection[str],
) -> dict[str, dict[str, Any]]:
  """Compares two models as `compare` does, with rows from `score_rows.check_rows`."""
  rows = rows_of(rows, (baseline, model))
  scorers = score_rows.scorers_of(rows)
  selected = score_rows.named(selected_by, scorers)
  may_miss = score_rows.named(imported, scorers)
  judge = score_rows.check_unit(unit, scorers)
  tables = {
    str(key): _table(group, baseline, model) for key, group in rows.groupby("key", sort=True)
  }
  chosen: dict[str, pd.MultiIndex | None] = dict.fromkeys(_SIDES)
  if judge is not None:
    pairs = _complete(judge, tables[judge], (baseline, model), drop=judge in may_miss)
    chosen = {side: score_rows.median_images(pairs[side]) for side in _SIDES}
  results = {}
  for key, table in tables.items():
    pairs = table
    if judge is None or key not in may_miss:
      pairs = _complete(key, table, (baseline, model), drop=key in may_miss)
    values = pd.DataFrame(
      {side: score_rows.unit_values(pairs[side], unit, chosen[side]) for side in _SIDES}
    )
    known = values.dropna()
    if known.empty:
      continue
    entry = _compare_values(known, seed=seed, resamples=resamples)
    entry["binary"] = bool(np.isin(table.to_numpy()[table.notna()], [0.0, 1.0]).all())
    entry["dropped"] = len(table) - len(pairs) + len(values) - len(known)
    entry["merged_prompts"] = score_rows.count_merged(rows)
    entry["selected_training_data"] = key in selected
    entry["unit"] = unit
    results[key] = entry
  family = {key: e["p_value"] for key, e in results.items() if key not in selected}
  adjusted = paired_tests.holm(family)
  return {
    key: dict(sorted((e | {"holm": adjusted.get(key)}).items())) for key, e in results.items()
  }


def rows_of(rows: pd.DataFrame, models: Sequence[str]) -> pd.DataFrame:
  """Returns the rows of these models.

  Raises:
    ValueError: a model has no rows, or is named twice.
  """
  if len(set(models)) < len(models):
    raise ValueError(f"a model cannot be compared with itself (got {', '.join(models)})")
  present = set(rows["model"])
  for model in models:
    if len(rows) and model not in present:
      raise ValueError(
        f"no rows of model {model!r} (got {', '.join(sorted(map(str, present)))})"
      )
  return rows[rows["model"].isin(models)]


def _table(rows: pd.DataFrame, baseline: str, model: str) -> pd.DataFrame:
  """Returns one scorer's scores by image, [image, side]; NaN where one is missing."""
  wide = rows.pivot(index=score_rows.IMAGE, columns="model", values="score")
  return wide.reindex(columns=[baseline, model]).set_axis(_SIDES, axis=1)


def _complete(
  key: str, table: pd.DataFrame, models: Sequence[str], *, drop: bool
) -> pd.DataFrame:
  """Returns the images that both models have a score of.

  Args:
    key: of the scorer.
    table: from `_table`.
    models: names of the sides.
    drop: whether other images are left out instead of refused.

  Raises:
    ValueError: an image has only one score, unless they are dropped.
  """
  half = table[table.isna().any(axis=1)]
  if len(half) and not drop:
    _, prompt, seed = half.index[0]
    lacking = models[int(half.iloc[0].isna().argmax())]
    more = f" (and {len(half) - 1} more)" if len(half) > 1 else ""
    raise ValueError(f"{key}: prompt {prompt}, seed {seed} has no {lacking} score{more}")
  return table.dropna()


def _compare_values(values: pd.DataFrame, *, seed: int, resamples: int) -> dict[str, Any]:
  """Compares pairs of values, indexed by image or by unit."""
  base, tuned = values["base"].to_numpy(), values["tuned"].to_numpy()
  difference = tuned - base
  win, loss = difference > TOLERANCE, difference < -TOLERANCE
  points = win + 0.5 * (~win & ~loss)  # ties count half
  decided = int(win.sum() + loss.sum())
  _, prompt = np.unique(values.index.get_level_values("unit"), return_inverse=True)
  counts = np.bincount(prompt)
  sums = np.stack([np.bincount(prompt, points), np.bincount(prompt, difference)], 1)
  interval, difference_interval = paired_tests.bootstrap_interval(
    sums, counts, seed=seed, resamples=resamples
  )
  by_prompt = np.bincount(prompt, difference) / counts
  alone = len(counts) == len(values)
  return {
    "base": _summary(base),
    "difference": float(difference.mean()),
    "difference_interval": difference_interval,
    "effect_size": paired_tests.effect_size(by_prompt),
    "interval": interval,
    "loss": float(loss.mean()),
    "p_value": paired_tests.t_test(by_prompt),
    "permutation": paired_tests.permutation(by_prompt, seed=seed, resamples=resamples),
    "prompts": len(counts),
    "sign_test": paired_tests.sign_test(by_prompt),
    "tie": float((~win & ~loss).mean()),
    "tuned": _summary(tuned),
    "wilcoxon": paired_tests.wilcoxon(by_prompt),
    "wilson_interval": (
      paired_tests.wilson_interval(points.sum(), len(counts)) if alone else [None, None]
    ),
    "win": float(win.mean()),
    "win_rate": float(points.mean()),
    "win_rate_decided": float(win.sum() / decided) if decided else None,
  }


def _summary(scores: np.ndarray) -> dict[str, Any]:
  n = len(scores)
  std = float(scores.std(ddof=1)) if n > 1 else None
  return {"mean": float(scores.mean()), "n": n, "std": std}


def by_category(
  rows: pd.DataFrame, *, baseline: str = "base", model: str = "tuned"
) -> list[dict[str, Any]]:
  """Computes means of two models per category and scorer.

  Args:
    rows: as for `compare`.
    baseline: name of the model under "base" in the results.
    model: name of the model under "tuned".

  Returns:
    One dict per category and scorer with `category, scorer, base, tuned, difference` (means
    over images) and `n` (pairs). GenEval's categories come first, in GenEval's order, then
    other categories by name; within a category, scorers are sorted by name.

  Raises:
    ValueError: for the same reasons as in `compare`.
  """
  rows = rows_of(score_rows.check_rows(rows), (baseline, model))
  categories = rows.drop_duplicates("prompt_id").set_index("prompt_id")["category"]
  table = []
  for key, group in rows.groupby("key", sort=True):
    scores = _table(group, baseline, model)
    pairs = _complete(str(key), scores, (baseline, model), drop=False)
    of = categories.reindex(pairs.index.get_level_values("prompt_id")).to_numpy()
    for category, part in pairs.groupby(of):
      base, tuned = float(part["base"].mean()), float(part["tuned"].mean())
      table.append(
        {
          "category": str(category),
          "scorer": str(key),
          "base": base,
          "tuned": tuned,
          "difference": tuned - base,
          "n": len(part),
        }
      )
  return sorted(table, key=lambda row: (*category_order(row["category"]), row["scorer"]))


def category_order(category: str) -> tuple[int, str]:
  """Returns a sorting key: GenEval's categories in GenEval's order, then others by name."""
  return [*CATEGORIES, category].index(category), category


def outcome(entry: dict[str, Any], *, adjusted: bool = False) -> str:
  """Returns the outcome of one scorer's entry of `compare`: "won", "lost" or "undecided".

  The tuned model won if the interval of the win rate is above 1/2, p < 0.05, and the difference
  of the means is positive. It lost if the opposite holds.

  Args:
    entry: of one scorer.
    adjusted: whether p is adjusted for the number of scorers (`holm`), not `p_value`.
  """
  low, high = entry["interval"]
  p = entry.get("holm") if adjusted else entry["p_value"]
  if low is None or p is None or p >= 0.05:
    return "undecided"
  if low > 0.5 and entry["difference"] > 0:
    return "won"
  if high < 0.5 and entry["difference"] < 0:
    return "lost"
  return "undecided"


def are_results(value: Any) -> bool:
  """Checks whether a value has the structure of the results of `compare`.

  Results of earlier versions have only the fields that `_is_entry` requires.
  """
  return isinstance(value, dict) and all(_is_entry(entry) for entry in value.values())


_TESTS = ("wilcoxon", "sign_test", "permutation", "holm", "effect_size")


def _is_entry(entry: Any) -> bool:
  def are_numbers(of: Any, *names: Any) -> bool:
    return all(isinstance(of[n], int | float) and math.isfinite(of[n]) for n in names)

  try:
    base, tuned = (entry[side] for side in _SIDES)
    intervals = (entry["interval"], entry["difference_interval"])
    # Numbers that do not exist are None: with one prompt, one image, or only ties.
    one_prompt = entry["p_value"] is None and all(i == [None, None] for i in intervals)
    wilson = entry.get("wilson_interval", [None, None])
    return (
      all(are_numbers(side, "mean", "n") for side in (base, tuned))
      and all(side["std"] is None or are_numbers(side, "std") for side in (base, tuned))
      and are_numbers(entry, "win", "tie", "loss", "win_rate", "difference", "prompts")
      and (entry["win_rate_decided"] is None or are_numbers(entry, "win_rate_decided"))
      and (one_prompt or all(len(i) == 2 and are_numbers(i, 0, 1) for i in intervals))
      and (entry["p_value"] is None or are_numbers(entry, "p_value"))
      and all(isinstance(entry[n], bool) for n in ("binary", "selected_training_data"))
      and all(entry.get(name) is None or are_numbers(entry, name) for name in _TESTS)
      and (wilson == [None, None] or (len(wilson) == 2 and are_numbers(wilson, 0, 1)))
      and all(are_numbers(entry, n) for n in ("dropped", "merged_prompts") if n in entry)
      and isinstance(entry.get("unit", "image"), str)
    )
  except (AttributeError, KeyError, TypeError, IndexError):
    return False


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
  """Writes results atomically as JSON with sorted keys.

  Raises:
    ValueError: a number is not finite.
  """
  text = json.dumps(results, indent=2, sort_keys=True, allow_nan=False)
  write_bytes(path, (text + "\n").encode())
