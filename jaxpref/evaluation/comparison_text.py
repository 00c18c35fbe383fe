"""Tables for the terminal of comparisons of any number of models."""

from collections.abc import Iterator
from typing import Any

from jaxpref.errors import count
from jaxpref.evaluation.score_text import number, p_text, percent, rate_text, table

_CHANGES = ("difference", "win", "tie", "loss", "win rate", "p", "Holm", "d_z")
_TESTED = ("difference", "p", "Holm")
_UNITS = {
  "image": "image by image",
  "mean": "by the mean of each prompt's images",
  "single": "by the first image of each prompt",
}


def comparisons_text(found: dict[str, Any]) -> str:
  """Formats the results of `comparisons.compare_all` as tables.

  The first has each scorer's models beside the baseline, the second all other pairs of models,
  the third the training runs of each group. Notes say what was compared and what was left out.
  """
  pairs = {(one["baseline"], one["model"]): one["scorers"] for one in found["comparisons"]}
  lines = [("scorer", "model", "mean", "std", "prompts", *_CHANGES)]
  others = [("scorer", "model", "against", *_CHANGES)]
  runs = [("scorer", "runs of", "runs", "mean", "std", "difference", "win rate")]
  for key, about in found["scorers"].items():
    name = f"{key} *" if about["selected_training_data"] else key
    for model, scorers in found["models"].items():
      if key in scorers:
        entry = pairs.get((found["baseline"], model), {}).get(key)
        lines.append((name, model, *_summary(scorers[key]), *_changes(entry)))
    for (one, other), entries in pairs.items():
      if one != found["baseline"] and key in entries:
        others.append((name, other, one, *_changes(entries[key])))
    for group, of in found["groups"].items():
      if key in of["scorers"]:
        runs.append((name, group, *_over_runs(of["scorers"][key])))
  tables = [table(lines, left=2) + "\n" + "\n".join(_notes(found))]
  tables += [table(more, left=left) for more, left in ((others, 3), (runs, 2)) if more[1:]]
  return "\n\n".join(tables) + "\n"


def diversity_text(found: dict[str, Any]) -> str:
  """Formats the results of `diversity.compare_diversity` as a table for the terminal."""
  return f"Diversity by {found['features']}\n{table(diversity_rows(found), left=1)}\n"


def diversity_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Lists a heading and the row of each model, for the results of `compare_diversity`.

  The difference and its p-values are those of the Vendi score by prompt. If prompts have one
  image each, the columns of diversity by prompt are left out.
  """
  overall = {
    model: tuple(number(of[measure]) for measure in ("vendi", "distance"))
    for model, of in found["overall"].items()
  }
  head: tuple[str, ...] = ("model", "Vendi", "distance")
  by_prompt = found["by_prompt"]
  if by_prompt is None:
    return [head, *((model, *sizes) for model, sizes in overall.items())]
  vendi, distance = (f"{measure}.{found['features']}-1" for measure in ("vendi", "distance"))
  entries = {
    one["model"]: one["scorers"][vendi]
    for one in by_prompt["comparisons"]
    if one["baseline"] == by_prompt["baseline"]
  }
  lines = [(*head, "Vendi by prompt", "distance by prompt", *_TESTED)]
  for model, sizes in overall.items():
    means = (number(by_prompt["models"][model][key]["mean"]) for key in (vendi, distance))
    tests = [""] * len(_TESTED)
    if model in entries:
      change = number(entries[model]["difference"], sign=True)
      tests = [change, *(p_text(entries[model][p]) for p in ("p_value", "holm"))]
    lines.append((model, *sizes, *means, *tests))
  return lines


def _summary(of: dict[str, Any]) -> tuple[str, ...]:
  return number(of["mean"]), number(of["std_prompts"]), str(of["prompts"])


def _changes(entry: dict[str, Any] | None) -> tuple[str, ...]:
  if entry is None:
    return ("",) * len(_CHANGES)
  return (
    number(entry["difference"], sign=True),
    *(percent(entry[share]) for share in ("win", "tie", "loss")),
    rate_text(entry),
    p_text(entry["p_value"]),
    p_text(entry["holm"]),
    number(entry["effect_size"], sign=True),
  )


def _over_runs(of: dict[str, Any]) -> tuple[str, ...]:
  change, rate = number(of["difference"], sign=True), "-"
  if of["win_rate"] is not None:
    rate = percent(of["win_rate"])
  if of["win_rate_std"] is not None:
    change += f" ± {number(of['difference_std'])}"
    rate += f" ± {percent(of['win_rate_std'])}"
  return str(of["runs"]), number(of["mean"]), number(of["std"]), change, rate


def _notes(found: dict[str, Any]) -> Iterator[str]:
  judge = found["unit"].partition(":")[2]
  unit = _UNITS.get(found["unit"], f"by each prompt's image of median {judge}")
  yield f"Compared with {found['baseline']} {unit}; std is over prompts."
  if any(of["selected_training_data"] for of in found["scorers"].values()):
    yield "* had a part in the training, so it is not evidence"
  if found["merged_prompts"]:
    yield f"{count(found['merged_prompts'], 'prompt')} with the text of another, merged with it"
  for one in found["comparisons"]:
    for key, entry in one["scorers"].items():
      if entry["dropped"]:
        pairs = f"{count(entry['dropped'], 'pair')} of {one['baseline']} and {one['model']}"
        yield f"{key}: {pairs} left out, because a score is missing"
