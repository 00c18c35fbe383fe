"""Statistics of paired scores of the base and the tuned model.

A row is one score of one image, `(model, prompt_id, seed, scorer, version, score)`, with the
image's `prompt` and `category`; higher scores are better. A pair is the two models' images of
one prompt and seed. Images of one prompt are not independent, so the unit of all intervals and
tests is the prompt, not the image.
"""

import json
import math
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from jaxpref.runtime.workdir import write_bytes

_KEYS = ("model", "prompt_id", "seed", "prompt", "category", "scorer", "version")
COLUMNS = (*_KEYS, "score")
_GENEVAL = ("single_object", "two_object", "counting", "colors", "position")
CATEGORIES = (*_GENEVAL, "color_attribution")
TOLERANCE = 1e-9
_MODELS = ("base", "tuned")
_CHUNK = 4_000_000  # indices sampled at once; limits the bootstrap's memory to about 100 MB


def compare(
  rows: pd.DataFrame,
  *,
  seed: int = 0,
  resamples: int = 10_000,
  selected_by: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
  """Compares the tuned model with the base model, scorer by scorer.

  Args:
    rows: one score per row, with the columns `COLUMNS`.
    seed: seed of the bootstrap, the same for each scorer, so that a scorer's numbers do not
      depend on the other scorers.
    resamples: number of bootstrap resamples.
    selected_by: keys ("<scorer>-<version>") or names of scorers that selected the training
      data; they are flagged and do not count for verdicts.

  Returns:
    "<scorer>-<version>" -> plain JSON values, sorted by key. A number that does not exist is
    None, never NaN:
      base, tuned: mean, std (n - 1 in the denominator) and n over images.
      win, tie, loss: rates over pairs for the tuned model; a tie is a difference of at most
        `TOLERANCE`.
      win_rate: win + tie / 2; interval: its 95 % interval.
      win_rate_decided: win / (win + loss), None if all pairs tie. It is more informative for
        binary scores, where most pairs tie.
      difference: mean of tuned - base; difference_interval: its 95 % interval.
      p_value: two-sided paired t-test on per-prompt mean scores. If the difference is the same
        for all prompts, the t-test has no variance, and a sign test replaces it.
      prompts: number of prompts; binary: whether every score is 0 or 1.
      selected_training_data: see `selected_by`.
    With one prompt, intervals are [None, None] and the p-value is None.

  Raises:
    ValueError: a column is missing, a model is neither "base" nor "tuned", a score is not
      finite, a row occurs twice, or a pair has only one score; the message names the row.
  """
  rows = _checked(rows)
  results = {}
  for key, group in rows.groupby("key", sort=True):
    pairs = _pairs(str(key), group)
    selected = key in selected_by or group["scorer"].iloc[0] in selected_by
    entry = _compare_one(pairs, seed=seed, resamples=resamples)
    entry["selected_training_data"] = bool(selected)
    results[str(key)] = dict(sorted(entry.items()))
  return results


def by_category(rows: pd.DataFrame) -> list[dict[str, Any]]:
  """Computes means per category and scorer.

  Args:
    rows: as for `compare`.

  Returns:
    One dict per category and scorer with `category, scorer, base, tuned, difference` (means
    over images) and `n` (pairs). GenEval's categories come first, in GenEval's order, then
    other categories by name; within a category, scorers are sorted by name.

  Raises:
    ValueError: for the same reasons as in `compare`.
  """
  rows = _checked(rows)
  table = []
  for key, group in rows.groupby("key", sort=True):
    for category, pairs in _pairs(str(key), group).groupby("category"):
      base, tuned = float(pairs["base"].mean()), float(pairs["tuned"].mean())
      table.append(
        {
          "category": str(category),
          "scorer": str(key),
          "base": base,
          "tuned": tuned,
          "difference": tuned - base,
          "n": len(pairs),
        }
      )

  def place(row: dict[str, Any]) -> tuple[int, str, str]:
    known = [*CATEGORIES, row["category"]].index(row["category"])
    return known, row["category"], row["scorer"]

  return sorted(table, key=place)


def outcome(entry: dict[str, Any]) -> str:
  """Returns the outcome of one scorer's entry of `compare`: "won", "lost" or "undecided".

  The tuned model won if the interval of the win rate is above 1/2, p < 0.05, and the difference
  of the means is positive. It lost if the opposite holds.
  """
  low, high = entry["interval"]
  p = entry["p_value"]
  if low is None or p is None or p >= 0.05:
    return "undecided"
  if low > 0.5 and entry["difference"] > 0:
    return "won"
  if high < 0.5 and entry["difference"] < 0:
    return "lost"
  return "undecided"


def to_text(results: dict[str, Any], categories: list[dict[str, Any]]) -> str:
  """Formats the results of `compare` and `by_category` as tables for the terminal."""
  head = "scorer", "base", "tuned", "difference", "win", "tie", "loss", "win rate", "p"
  lines: list[tuple[str, ...]] = [head]
  for key, e in results.items():
    low, high = e["interval"]
    rate = percent(e["win_rate"])
    if low is not None:
      rate += f" ({percent(low)[:-2]} to {percent(high)})"
    sides = (f"{number(e[s]['mean'])} ± {number(e[s]['std'])}" for s in _MODELS)
    shares = (percent(e[s]) for s in ("win", "tie", "loss"))
    flag = " *" if e["selected_training_data"] else ""
    change = number(e["difference"], sign=True)
    lines.append((key + flag, *sides, change, *shares, rate, p_text(e["p_value"])))
  text = _table(lines, left=1)
  if any(e["selected_training_data"] for e in results.values()):
    text += "\n* selected the training data, so it is not evidence"
  lines = [("category", "scorer", "base", "tuned", "difference", "n")]
  for r in categories:
    means = (number(r[s]) for s in _MODELS)
    change = number(r["difference"], sign=True)
    lines.append((r["category"], r["scorer"], *means, change, str(r["n"])))
  return text + "\n\n" + _table(lines, left=2) + "\n"


def percent(share: float) -> str:
  """Formats a share as "71 %"; near 0 and 1 with a decimal, so that 99.6 % is not 100 %."""
  near_end = 0 < share < 0.01 or 0.99 < share < 1
  return f"{100 * share:.{int(near_end)}f} %"


def number(value: float | None, *, sign: bool = False) -> str:
  """Formats a score with about three significant digits, None as "-"."""
  if value is None:
    return "-"
  size = abs(value)
  if size >= 1e5 or 0 < size < 1e-3:
    return f"{value:{'+' if sign else ''}.1e}"
  return f"{value:{'+' if sign else ''}.{3 if size < 10 else 2 if size < 100 else 1}f}"


def p_text(p: float | None) -> str:
  """Formats a p-value as "0.023", "1e-12", "< 1e-15" (smaller is not meaningful) or "-"."""
  if p is None:
    return "-"
  if p < 1e-15:
    return "< 1e-15"
  return f"{p:.0e}" if p < 1e-3 else f"{p:.2g}"


def _table(lines: list[tuple[str, ...]], *, left: int) -> str:
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = [
    "  ".join(f"{c:{'<' if i < left else '>'}{widths[i]}}" for i, c in enumerate(line))
    for line in lines
  ]
  return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def bootstrap_interval(
  sums: np.ndarray, counts: np.ndarray, *, seed: int, resamples: int
) -> list[list[float]] | list[list[None]]:
  """Computes 95 % percentile bootstrap intervals of means, by resampling prompts.

  Args:
    sums: sums of each quantity over the images of a prompt, [prompts, quantities].
    counts: number of images of each prompt, [prompts].
    seed: seed of the resampling.
    resamples: number of resamples.

  Returns:
    `[low, high]` for each quantity; `[None, None]` with only one prompt, where resampling
    would give an interval of width 0.
  """
  prompts, quantities = sums.shape
  if prompts < 2:
    return [[None, None] for _ in range(quantities)]
  rng = np.random.default_rng(seed)
  means = []
  left = resamples
  while left > 0:
    size = min(left, max(1, _CHUNK // prompts))
    chosen = rng.integers(prompts, size=(size, prompts))
    total = np.stack([s[chosen].sum(1) for s in sums.T], axis=1)
    means.append(total / counts[chosen].sum(1)[:, None])
    left -= size
  bounds = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)
  return [[float(low), float(high)] for low, high in bounds.T]


def write_rows(path: str | os.PathLike[str], rows: pd.DataFrame) -> None:
  """Writes the rows atomically as parquet, with the columns `COLUMNS`.

  Raises:
    ValueError: for the same reasons as in `compare`, except that pairs may be incomplete.
  """
  table = _checked(rows)[list(COLUMNS)]
  write_bytes(path, table.to_parquet(index=False, engine="pyarrow"))


def are_results(value: Any) -> bool:
  """Checks whether a value has the structure of the results of `compare`."""
  return isinstance(value, dict) and all(_is_entry(entry) for entry in value.values())


def _is_entry(entry: Any) -> bool:
  def are_numbers(of: Any, *names: Any) -> bool:
    return all(isinstance(of[n], int | float) and math.isfinite(of[n]) for n in names)

  try:
    base, tuned = (entry[model] for model in _MODELS)
    intervals = (entry["interval"], entry["difference_interval"])
    # Numbers that do not exist are None: with one prompt, one image, or only ties.
    one_prompt = entry["p_value"] is None and all(i == [None, None] for i in intervals)
    return (
      all(are_numbers(side, "mean", "n") for side in (base, tuned))
      and all(side["std"] is None or are_numbers(side, "std") for side in (base, tuned))
      and are_numbers(entry, "win", "tie", "loss", "win_rate", "difference", "prompts")
      and (entry["win_rate_decided"] is None or are_numbers(entry, "win_rate_decided"))
      and (one_prompt or all(len(i) == 2 and are_numbers(i, 0, 1) for i in intervals))
      and (entry["p_value"] is None or are_numbers(entry, "p_value"))
      and all(isinstance(entry[n], bool) for n in ("binary", "selected_training_data"))
    )
  except (KeyError, TypeError, IndexError):
    return False


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
  """Writes results atomically as JSON with sorted keys.

  Raises:
    ValueError: a number is not finite.
  """
  text = json.dumps(results, indent=2, sort_keys=True, allow_nan=False)
  write_bytes(path, (text + "\n").encode())


def _checked(rows: pd.DataFrame) -> pd.DataFrame:
  missing = [name for name in COLUMNS if name not in rows.columns]
  if missing:
    raise ValueError(f"rows lack the columns {', '.join(missing)}")
  unknown = set(rows["model"]) - set(_MODELS)
  if unknown:
    raise ValueError(f"model must be base or tuned (got {sorted(map(str, unknown))})")
  rows = rows.assign(
    score=rows["score"].astype(np.float64),
    version=rows["version"].astype(str),
    key=rows["scorer"].astype(str) + "-" + rows["version"].astype(str),
  )
  bad = rows[~np.isfinite(rows["score"])]
  if len(bad):
    raise ValueError(f"{_name(bad.iloc[0])} must be finite (got {bad.iloc[0]['score']})")
  twice = rows[rows.duplicated(["model", "prompt_id", "seed", "key"])]
  if len(twice):
    raise ValueError(f"{_name(twice.iloc[0])} occurs twice")
  return rows


def _name(row: pd.Series) -> str:
  where = f"model {row['model']}, prompt {row['prompt_id']}, seed {row['seed']}"
  return f"the score of {row['key']} for {where}"


def _pairs(key: str, group: pd.DataFrame) -> pd.DataFrame:
  columns = ["prompt_id", "seed", "category", "score"]
  base, tuned = (group.loc[group["model"] == m, columns] for m in _MODELS)
  pairs = base.merge(
    tuned.drop(columns="category"),
    on=["prompt_id", "seed"],
    how="outer",
    suffixes=("_base", "_tuned"),
    indicator=True,
  )
  half = pairs[pairs["_merge"] != "both"]
  if len(half):
    first = half.iloc[0]
    lacking = "tuned" if first["_merge"] == "left_only" else "base"
    more = f" (and {len(half) - 1} more)" if len(half) > 1 else ""
    raise ValueError(
      f"{key}: prompt {first['prompt_id']}, seed {first['seed']} has no {lacking} score{more}"
    )
  return pairs.rename(columns={"score_base": "base", "score_tuned": "tuned"})


def _compare_one(pairs: pd.DataFrame, *, seed: int, resamples: int) -> dict[str, Any]:
  base, tuned = pairs["base"].to_numpy(), pairs["tuned"].to_numpy()
  difference = tuned - base
  win, loss = difference > TOLERANCE, difference < -TOLERANCE
  points = win + 0.5 * (~win & ~loss)  # ties count half
  decided = int(win.sum() + loss.sum())
  _, prompt = np.unique(pairs["prompt_id"].to_numpy(), return_inverse=True)
  counts = np.bincount(prompt)
  sums = np.stack([np.bincount(prompt, points), np.bincount(prompt, difference)], 1)
  interval, difference_interval = bootstrap_interval(
    sums, counts, seed=seed, resamples=resamples
  )
  return {
    "base": _summary(base),
    "binary": bool(np.isin(np.concatenate([base, tuned]), [0.0, 1.0]).all()),
    "difference": float(difference.mean()),
    "difference_interval": difference_interval,
    "interval": interval,
    "loss": float(loss.mean()),
    "p_value": _p_value(*(np.bincount(prompt, s) / counts for s in (tuned, base))),
    "prompts": len(counts),
    "tie": float((~win & ~loss).mean()),
    "tuned": _summary(tuned),
    "win": float(win.mean()),
    "win_rate": float(points.mean()),
    "win_rate_decided": float(win.sum() / decided) if decided else None,
  }


def _summary(scores: np.ndarray) -> dict[str, Any]:
  n = len(scores)
  std = float(scores.std(ddof=1)) if n > 1 else None
  return {"mean": float(scores.mean()), "n": n, "std": std}


def _p_value(tuned: np.ndarray, base: np.ndarray) -> float | None:
  if len(tuned) < 2:
    return None
  difference = tuned - base
  # With equal differences for all prompts, the t statistic would be 0 / 0 or x / 0.
  if np.ptp(difference) <= TOLERANCE:
    return 1.0 if abs(difference.mean()) <= TOLERANCE else 2.0 ** (1 - len(difference))
  return float(scipy.stats.ttest_rel(tuned, base).pvalue)
