"""Comparisons of a campaign's models by `jaxpref.evaluation`, and their tables.

Tests are paired, with the prompt as the unit: its value is the mean over its images and over a
method's training runs. What another training run would give is reported apart.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd
import scoring

from jaxpref.evaluation import comparisons, paired_tests, score_rows, statistics
from jaxpref.evaluation.score_text import p_text

Entries = dict[str, dict[str, Any]]  # scorer -> entry of `statistics.compare`
SHOWN = (*scoring.JUDGES, scoring.VENDI)  # scorers of the tables, in their order
TITLES = dict(zip(SHOWN, ("correct", "quality", "likeness", "Vendi"), strict=True))
RESAMPLES = 10_000  # of the bootstrap and of the permutation test
_IMAGE = [column for column in score_rows.COLUMNS if column != "score"]


def together(rows: pd.DataFrame) -> pd.DataFrame:
  """Averages scores over the training runs of a method: "dro/seed0", "dro/seed1" are "dro"."""
  methods = rows["model"].map(lambda name: re.sub(r"/seed\d+$", "", name))
  scores = rows.assign(model=methods).groupby(_IMAGE, sort=False)["score"].mean()
  return scores.reset_index()


def compare_pairs(
  rows: pd.DataFrame, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Entries]:
  """Compares models with others, by each of `SHOWN`.

  Args:
    rows: of `score_rows`.
    pairs: model and baseline of each comparison.

  Returns:
    (model, baseline) -> scorer -> entry of `statistics.compare`, whose `holm` is adjusted for
    all of these comparisons together.
  """
  rows = rows[rows["scorer"].isin(SHOWN)]
  found: dict[tuple[str, str], Entries] = {}
  for model, baseline in pairs:
    entries = statistics.compare(
      rows, baseline=baseline, model=model, unit="mean", resamples=RESAMPLES
    )
    found[model, baseline] = {key.rpartition("-")[0]: entry for key, entry in entries.items()}
  tests = {(pair, s): entry["p_value"] for pair, of in found.items() for s, entry in of.items()}
  for (pair, scorer), p in paired_tests.holm(tests).items():
    found[pair][scorer]["holm"] = p
  return found


def against(
  rows: pd.DataFrame, baseline: str, models: Sequence[str] | None = None
) -> dict[str, Entries]:
  """Compares models, by default all, with one: model -> scorer -> as in `compare_pairs`."""
  others = [m for m in models or rows["model"].drop_duplicates() if m != baseline]
  compared = compare_pairs(rows, [(model, baseline) for model in others])
  return {model: entries for (model, _), entries in compared.items()}


def over_runs(rows: pd.DataFrame, baseline: str) -> dict[str, dict[str, dict[str, Any]]]:
  """Summarizes the training runs of each method: method -> scorer -> over runs.

  See `groups` of `comparisons.compare_all`.
  """
  rows = rows[rows["scorer"].isin(SHOWN)]
  by_method: dict[str, list[str]] = {}
  for name in rows["model"].drop_duplicates():
    if name != baseline:
      by_method.setdefault(name.rpartition("/")[0], []).append(name)
  found = {}
  for method, runs in by_method.items():
    # Means and deviations of the runs need no bootstrap.
    compared = comparisons.compare_all(rows, baseline=baseline, models=runs, resamples=1)
    of = compared["groups"][method]["scorers"]
    found[method] = {key.rpartition("-")[0]: numbers for key, numbers in of.items()}
  return found


def each_other(rows: pd.DataFrame, baseline: str) -> list[dict[str, Any]]:
  """Compares all pairs of models by the judges: `model`, `against`, `result` and the scorers.

  The result is `comparisons.judge`'s, with Holm's p-values over the judges.
  """
  judged = rows[rows["scorer"].isin(scoring.JUDGES)]
  found = comparisons.compare_all(judged, baseline=baseline, resamples=RESAMPLES)
  kept = ("difference", "win_rate", "interval", "p_value", "holm")
  return [
    {
      "model": one["model"],
      "against": one["baseline"],
      "result": one["verdict"]["result"],
      "scorers": {
        key: {name: entry[name] for name in kept} for key, entry in one["scorers"].items()
      },
    }
    for one in found["comparisons"]
  ]


def outcomes(entries: Mapping[str, dict[str, Any]]) -> dict[str, str]:
  """Returns "won", "lost" or "undecided" by scorer, with the adjusted p-values."""
  return {s: statistics.outcome(entry, adjusted=True) for s, entry in entries.items()}


def parted(found: Mapping[str, Entries], chosen_by: Collection[str]) -> list[str]:
  """Writes a sentence on each model that wins by what chose its setting and loses otherwise.

  Args:
    found: from `against`.
    chosen_by: the scorers that chose.
  """
  said = []
  for model, entries in found.items():
    by = outcomes(entries)
    rises = [TITLES[s] for s in SHOWN if by.get(s) == "won" and s in chosen_by]
    falls = [TITLES[s] for s in SHOWN if by.get(s) == "lost"]
    if rises and falls:
      said.append(f"{model} wins by {' and '.join(rises)} and loses by {' and '.join(falls)}")
  return said


def table(found: Mapping[str, Entries]) -> list[str]:
  """Formats the results of `against` as a table: differences with Holm's p, quality's wins."""
  heads = [f"{TITLES[s]}, p" for s in SHOWN]
  lines = [f"| | {' | '.join(heads)} | wins by quality | scorers |", "|---" * 7 + "|"]
  for model, entries in found.items():
    cells = [difference(entries[s]) if s in entries else "" for s in SHOWN]
    verdict = result(outcomes(entries))
    rate = win_rate(entries["shapes.quality"])
    lines.append(f"| {model} | {' | '.join(cells)} | {rate} | {verdict} |")
  return lines


def result(by: Mapping[str, str]) -> str:
  """Sums up the outcomes by the judges: better, worse, mixed or undecided.

  Diversity has no part in it: noise raises it too. Its losses are in `parted`.
  """
  said = {of for scorer, of in by.items() if scorer in scoring.JUDGES} - {"undecided"}
  if len(said) > 1:
    return "mixed"
  return {"won": "better", "lost": "worse"}.get(next(iter(said), ""), "undecided")


def difference(entry: Mapping[str, Any]) -> str:
  """Formats a mean difference and its adjusted p-value."""
  return f"{entry['difference']:+.3f}, {p_text(entry['holm'])}"


def win_rate(entry: Mapping[str, Any]) -> str:
  """Formats a win rate with its 95 % interval over prompts."""
  low, high = entry["interval"]
  if low is None:  # of a single prompt
    return f"{entry['win_rate']:.3f}"
  return f"{entry['win_rate']:.3f} [{low:.3f}, {high:.3f}]"


def spread(over: Mapping[str, Any]) -> str:
  """Formats the mean over training runs and their standard deviation."""
  mean = f"{over['mean']:.3f}"
  return mean if over["std"] is None else f"{mean} +- {over['std']:.3f}"


def by_category(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
  """Returns correctness by category: category -> model -> mean over images."""
  correct = rows[rows["scorer"] == scoring.JUDGES[0]]
  return {
    one["category"]: {model: of["mean"] for model, of in one["models"].items()}
    for one in comparisons.category_means(correct)
  }


def matrix(pairs: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
  """Formats `each_other` as a table of a sign for each model against each other."""
  signs = {"won": "+", "lost": "-", "mixed": "m", "undecided": "."}
  turned = {"+": "-", "-": "+"}
  found = {}
  for one in pairs:
    sign = signs[one["result"]]
    found[one["model"], one["against"]] = sign
    found[one["against"], one["model"]] = turned.get(sign, sign)
  lines = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
  for model in models:
    cells = (found.get((model, other), "") for other in models)
    lines.append(f"| {model} | {' | '.join(cells)} |")
  return lines
