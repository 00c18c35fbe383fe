"""Comparisons of any number of models: each with a baseline and with each other."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from jaxpref.evaluation import score_rows, statistics

_RUN = re.compile(r"(.+)/seed-?\d+")


def compare_all(
  rows: pd.DataFrame,
  *,
  baseline: str,
  models: Sequence[str] | None = None,
  unit: str = "mean",
  seed: int = 0,
  resamples: int = 10_000,
  selected_by: Collection[str] = (),
  imported: Collection[str] = (),
  groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """Compares each model with the baseline and with each other model.

  Args:
    rows: one score per row, with the columns `score_rows.COLUMNS`.
    baseline: name of the model that all others are compared with first.
    models: names of all models, in the order of the results; by default those of `rows`, in
      their order there.
    unit: as for `statistics.compare`.
    seed: as for `statistics.compare`.
    resamples: as for `statistics.compare`.
    selected_by: as for `statistics.compare`.
    imported: as for `statistics.compare`.
    groups: model -> name of its group, for models that are training runs of one method; by
      default "dro/seed0" and "dro/seed1" are runs of "dro".

  Returns:
    Plain JSON values:
      baseline, unit, seed, resamples: see above.
      prompts: number of prompts with different texts; merged_prompts: number of prompts that
        repeat another prompt's text.
      scorers: key -> `binary`, `imported`, `selected_training_data`.
      models: model -> key -> `mean` over units, `std_prompts` of the prompts' values,
        `std_images`, `prompts` and `images` (their numbers).
      groups: group -> `models` (its runs) and `scorers`: key -> over runs, the `mean` and `std`
        of a run's mean, their number `runs`, and, against the baseline, the mean `difference`
        and `win_rate` with `difference_std` and `win_rate_std`.
      comparisons: list of `baseline`, `model`, `scorers` (see `statistics.compare`) and
        `verdict`, see `judge`. Those with the baseline come first, then all other pairs.

  Raises:
    ValueError: for the reasons of `statistics.compare`.
  """
  rows = score_rows.check_rows(rows, imported=imported)
  names = list(models or rows["model"].drop_duplicates())
  names = [baseline, *(name for name in names if name != baseline)]
  rows = statistics.rows_of(rows, names)
  scorers = score_rows.scorers_of(rows)
  selected = score_rows.named(selected_by, scorers)
  comparisons = []
  for one, other in itertools.combinations(names, 2):
    entries = statistics.compare_checked(
      *(rows, one, other),
      unit=unit,
      seed=seed,
      resamples=resamples,
      selected_by=selected_by,
      imported=imported,
    )
    comparisons.append(
      {"baseline": one, "model": other, "scorers": entries, "verdict": judge(entries)}
    )
  judging = score_rows.check_unit(unit, scorers)
  summaries = {name: _summaries(rows[rows["model"] == name], unit, judging) for name in names}
  may_miss = score_rows.named(imported, scorers)
  return {
    "baseline": baseline,
    "comparisons": comparisons,
    "groups": _groups(groups if groups is not None else _runs(names), summaries, comparisons),
    "merged_prompts": score_rows.count_merged(rows),
    "models": summaries,
    "prompts": int(rows["unit"].nunique()),
    "resamples": resamples,
    "scorers": {
      str(key): {
        "binary": bool(scores.dropna().isin([0.0, 1.0]).all()),
        "imported": key in may_miss,
        "selected_training_data": key in selected,
      }
      for key, scores in rows.groupby("key")["score"]
    },
    "seed": seed,
    "unit": unit,
  }


def judge(entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
  """Sums up a comparison: what scorers say together, and the outcome of each.

  Scorers that had a part in the training have none in it.

  Args:
    entries: from `statistics.compare`.

  Returns:
    `won`, `lost`, `undecided`: keys by `statistics.outcome` with p-values adjusted by Holm's
    method; `result`: "won" or "lost" if a scorer says so and none the opposite, "mixed" if
    scorers disagree, else "undecided".
  """
  said: dict[str, Any] = {"won": [], "lost": [], "undecided": []}
  for key, entry in entries.items():
    if not entry["selected_training_data"]:
      said[statistics.outcome(entry, adjusted=True)].append(key)
  if said["won"] and said["lost"]:
    result = "mixed"
  else:
    result = next((name for name in ("won", "lost") if said[name]), "undecided")
  return said | {"result": result}


def category_means(
  rows: pd.DataFrame, *, imported: Collection[str] = ()
) -> list[dict[str, Any]]:
  """Computes each model's mean per category and scorer.

  Args:
    rows: as for `compare_all`.
    imported: as for `statistics.compare`.

  Returns:
    One dict per category and scorer with `category, scorer` and `models`: model -> `mean` over
    images, `n` (images). Sorted as by `statistics.by_category`; models in the rows' order.
  """
  rows = score_rows.check_rows(rows, imported=imported).dropna(subset="score")
  found = rows.groupby(["category", "key", "model"], sort=False)["score"].agg(["mean", "size"])
  table: dict[tuple[str, str], dict[str, Any]] = {}
  for (category, key, model), (mean, n) in zip(
    found.index, found.itertuples(index=False), strict=True
  ):
    models = table.setdefault((str(category), str(key)), {})
    models[str(model)] = {"mean": float(mean), "n": int(n)}
  return [
    {"category": category, "scorer": key, "models": models}
    for (category, key), models in sorted(
      table.items(), key=lambda item: (*statistics.category_order(item[0][0]), item[0][1])
    )
  ]


def are_comparisons(value: Any) -> bool:
  """Checks whether a value has the structure of the results of `compare_all`."""
  try:
    return (
      all(isinstance(value[name], str) for name in ("baseline", "unit"))
      and all(isinstance(value[name], int) for name in ("prompts", "merged_prompts"))
      and all(isinstance(value[name], dict) for name in ("scorers", "groups"))
      and value["baseline"] in value["models"]
      and all(
        isinstance(one[name], int | float)
        for of in value["models"].values()
        for one in of.values()
        for name in ("mean", "prompts", "images")
      )
      and all(
        {one["baseline"], one["model"]} <= value["models"].keys()
        and statistics.are_results(one["scorers"])
        and one["verdict"]["result"] in ("won", "lost", "mixed", "undecided")
        and all(isinstance(one["verdict"][name], list) for name in ("won", "lost", "undecided"))
        for one in value["comparisons"]
      )
    )
  except (AttributeError, KeyError, TypeError):
    return False


def _summaries(rows: pd.DataFrame, unit: str, judging: str | None) -> dict[str, Any]:
  """Summarizes one model's scores by scorer."""
  by_key = {
    str(key): group.set_index(score_rows.IMAGE)["score"].dropna().sort_index()
    for key, group in rows.groupby("key", sort=True)
  }
  chosen = None if judging is None else score_rows.median_images(by_key[judging])
  found = {}
  for key, scores in by_key.items():
    values = score_rows.unit_values(scores, unit, chosen).dropna()
    if len(values):
      found[key] = {
        "images": len(scores),
        "mean": float(values.mean()),
        "prompts": int(values.index.get_level_values("unit").nunique()),
        "std_images": _std(scores),
        "std_prompts": _std(values.groupby(level="unit").mean()),
      }
  return found


def _runs(models: Sequence[str]) -> dict[str, str]:
  """Returns the group of each model whose name ends in "/seed" and a number."""
  return {name: match[1] for name in models if (match := _RUN.fullmatch(name))}


def _groups(
  groups: Mapping[str, str],
  summaries: Mapping[str, dict[str, Any]],
  comparisons: Sequence[dict[str, Any]],
) -> dict[str, Any]:
  """Summarizes the training runs of each group."""
  # The baseline's comparisons come first, one for each other model.
  against = {one["model"]: one["scorers"] for one in comparisons[: len(summaries) - 1]}
  found: dict[str, Any] = {}
  for group in dict.fromkeys(groups.values()):
    runs = [name for name in summaries if groups.get(name) == group]
    if not runs:
      continue
    scorers = {}
    for key in sorted({key for run in runs for key in summaries[run]}):
      means = [summaries[run][key]["mean"] for run in runs if key in summaries[run]]
      scorers[key] = {"mean": float(np.mean(means)), "runs": len(means), "std": _std(means)}
      for field in ("difference", "win_rate"):
        values = [against[run][key][field] for run in runs if key in against.get(run, ())]
        scorers[key][field] = float(np.mean(values)) if values else None
        scorers[key][f"{field}_std"] = _std(values)
    found[group] = {"models": runs, "scorers": scorers}
  return found


def _std(values: Sequence[float] | pd.Series) -> float | None:
  return float(np.std(np.asarray(values), ddof=1)) if len(values) > 1 else None
