"""Warnings of reward hacking: the scorer that a model learns from rises while others fall.

A model that is tuned on what a scorer selected or rewarded can please that scorer and become
worse. The signs are a scorer with no part in the training that falls, or a loss of diversity.
Reports and the alarms of online runs have the same rule.
"""

from collections.abc import Collection, Sequence
from typing import Any

from jaxpref.evaluation import statistics
from jaxpref.evaluation.score_text import number, p_is


def find_hacking(
  found: dict[str, Any],
  diversity: Sequence[dict[str, Any]] = (),
  *,
  role: str = "had a part in the training",
) -> list[str]:
  """Writes one sentence for each model whose scores contradict each other.

  A selecting scorer rises if its outcome is "won" (`statistics.outcome`). Another scorer or a
  Vendi score falls if its outcome is "lost" with p adjusted by Holm's method among the scorers
  of the comparison, or among the measures of diversity by the same features.

  Args:
    found: from `comparisons.compare_all`. Without scorers of `selected_by`, nothing is said.
    diversity: from `diversity.compare_diversity`, with the same baseline, one for each kind of
      features.
    role: of the scorers of `selected_by`, after "which".
  """
  said = []
  for one in found["comparisons"]:
    if one["baseline"] != found["baseline"]:
      continue
    rises, falls = [], []
    for key, entry in one["scorers"].items():
      if entry["selected_training_data"]:
        if statistics.outcome(entry) == "won":
          rises.append(_change(key, entry, entry["p_value"]))
      elif statistics.outcome(entry, adjusted=True) == "lost":
        falls.append(_change(key, entry, entry["holm"]))
    falls += [
      _change(key, entry, entry["holm"])
      for of in diversity
      for key, entry in _diversity_of(of, one["baseline"], one["model"]).items()
      if key.startswith("vendi.") and statistics.outcome(entry, adjusted=True) == "lost"
    ]
    if rises and falls:
      verb = "rises" if len(rises) == 1 else "rise"
      said.append(
        f"{one['model']} against {one['baseline']}: {' and '.join(rises)}, which {role}, "
        f"{verb}, but {' and '.join(falls)} {'falls' if len(falls) == 1 else 'fall'}: the rise "
        "may not be an improvement."
      )
  return said


def find_in_run(
  results: dict[str, Any],
  diversity: Sequence[dict[str, Any]] = (),
  *,
  trained: Collection[str] = (),
  role: str = "is trained on",
) -> list[str]:
  """Writes the sentence on a training run's model against its base, if there is one.

  Args:
    results: from `statistics.compare`.
    diversity: as for `find_hacking`.
    trained: scorers that the run is trained on, instead of those of `selected_by`.
    role: of the scorers of `trained`, after "which".
  """
  one = {"baseline": "base", "model": "tuned", "scorers": results}
  found = {"baseline": "base", "comparisons": [one]}
  if not trained:
    return find_hacking(found, diversity)
  begins = tuple(f"{name}-" for name in trained)  # keys are "<scorer>-<version>"
  one["scorers"] = {
    key: entry | {"selected_training_data": key.startswith(begins)}
    for key, entry in results.items()
  }
  return find_hacking(found, diversity, role=role)


def _diversity_of(of: dict[str, Any], baseline: str, model: str) -> dict[str, Any]:
  for one in (of["by_prompt"] or {"comparisons": []})["comparisons"]:
    if (one["baseline"], one["model"]) == (baseline, model):
      return one["scorers"]
  return {}


def _change(key: str, entry: dict[str, Any], p: float) -> str:
  return f"{key} ({number(entry['difference'], sign=True)}, {p_is(p)})"
