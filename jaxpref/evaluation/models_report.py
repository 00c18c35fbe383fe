"""The report that compares any number of models, as one self-contained HTML file.

Like `report`, whose style it shares: this module turns numbers into positions and words, and
`models_report.html.j2` lays them out. The filters of the images are radio buttons, which the
style sheet evaluates; the page needs no script.
"""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jaxpref.evaluation import diversity as diversity_lib
from jaxpref.evaluation import geneval, plots, report
from jaxpref.evaluation.score_text import number, p_text, percent
from jaxpref.runtime.workdir import write_bytes

_THUMBNAIL = 256  # pixels of the longer side; larger images are scaled down


def write(
  path: str | os.PathLike[str],
  *,
  title: str,
  results: Mapping[str, Any],
  categories: Sequence[Mapping[str, Any]],
  units: Mapping[str, Mapping[str, np.ndarray]],
  examples: Sequence[Mapping[str, Any]],
  warnings: Sequence[str],
  facts: Mapping[str, str],
) -> None:
  """Writes the report atomically.

  Args:
    path: path of the report.
    title: heading of the page.
    results: from `comparisons.compare_all`, with `diversity` from
      `diversity.compare_diversity` and, if GenEval's program judged models, `geneval`: model ->
      `geneval.summarize_results`.
    categories: from `comparisons.category_means`.
    units: scorer's key -> model -> the compared values, one per prompt, for distributions.
    examples: mappings with `prompt, category, seed`; `at_random`, whether the prompt was chosen
      at random; `images`, model -> path of a PNG; and `scores`, key -> model -> score. Models
      without the image are left out of both. The page keeps their order.
    warnings: sentences that are shown first.
    facts: label -> value.

  Raises:
    ValueError: an image cannot be read.
    OSError: the file cannot be written.
  """
  models, baseline = list(results["models"]), results["baseline"]
  diversity = results["diversity"]
  spread = _vendi_by_prompt(diversity)
  keys = order_scorers(results)
  judge = keys[0] if keys else None
  html = (
    report.make_environment()
    .get_template("models_report.html.j2")
    .render(
      title=title,
      models=models,
      baseline=baseline,
      colors={name: _color(i) for i, name in enumerate(models)},
      judge=judge,
      verdicts=verdicts(results),
      warnings=warnings,
      unit=unit_sentence(results["unit"]),
      results=results,
      scorers=[(key, _against_baseline(results, key)) for key in keys],
      matrices=[(key, _matrix(results, key)) for key in keys] if len(models) > 2 else [],
      scatters=[
        plot for key in keys if (plot := plots.scatter(results, key, spread)) is not None
      ],
      distributions=[
        plot
        for key in keys
        if (plot := plots.distribution(key, units.get(key, {}))) is not None
      ],
      spread=spread,
      diversity=diversity,
      categories=_categories(categories, keys, models),
      geneval=results.get("geneval", {}),
      tasks=geneval.TASKS,
      examples=_ranked([_example(e, results, judge) for e in examples], len(models)),
      plot_width=plots.WIDTH,
      plot_height=plots.HEIGHT,
      plot_bottom=plots.HEIGHT - plots.BOTTOM,
      plot_left=plots.LEFT,
      facts={name: report.shorten(str(value), 500) for name, value in facts.items()},
    )
  )
  write_bytes(path, html.encode())


def _vendi_by_prompt(diversity: Mapping[str, Any]) -> dict[str, float]:
  """Returns each model's mean Vendi score over prompts; none if prompts have one image."""
  key = f"vendi.{diversity['features']}-{diversity_lib.VERSION}"
  of = (diversity["by_prompt"] or {"models": {}})["models"]
  return {model: scorers[key]["mean"] for model, scorers in of.items()}


def order_scorers(results: Mapping[str, Any]) -> list[str]:
  """Orders the scorers: those that count for verdicts first, of these the graded ones."""
  about = results["scorers"]
  return sorted(
    about, key=lambda k: (about[k]["selected_training_data"], about[k]["binary"], k)
  )


def unit_sentence(unit: str) -> str:
  """Says what the compared values are."""
  kind, _, scorer = unit.partition(":")
  return {
    "image": "Each image counts by itself.",
    "mean": "A prompt's score is the mean over its images.",
    "single": "A prompt's score is that of its first image.",
    "median": f"A prompt's score is that of its image of median {scorer}.",
  }[kind]


def verdicts(results: Mapping[str, Any]) -> list[dict[str, str]]:
  """Writes one sentence on each model against the baseline: `result` and `text`."""
  keys, baseline = order_scorers(results), results["baseline"]
  about, found = results["scorers"], []
  for one in results["comparisons"]:
    if one["baseline"] != baseline:
      continue
    model, result = one["model"], one["verdict"]["result"]
    given = [k for k in keys if k in one["scorers"]]
    counted = [k for k in given if not about[k]["selected_training_data"]]
    if not given:
      continue
    begin = {
      "won": f"{model} is better than {baseline}",
      "lost": f"{model} is worse than {baseline}",
      "mixed": f"The scorers disagree on {model} against {baseline}",
      "undecided": f"It is undecided whether {model} or {baseline} is better",
    }[result]
    said = "; ".join(f"{key} {_rate(one['scorers'][key])}" for key in counted)
    if not counted:
      chose = " and ".join(f"{key}, {_rate(one['scorers'][key])}," for key in given)
      them = "it is" if len(given) == 1 else "they are"
      said = f"no scorer counts. {chose} had a part in the training, so {them} not evidence"
    found.append({"result": result, "text": f"{begin}: {said}."})
  return found


def _rate(entry: Mapping[str, Any]) -> str:
  low, high = entry["interval"]
  p = entry["holm"] if entry["holm"] is not None else entry["p_value"]
  text = f"{percent(entry['win_rate'])} wins"
  if low is not None:
    text += f" ({percent(low)[:-2]} to {percent(high)})"
  return text if p is None else f"{text}, p {'' if p_text(p)[0] == '<' else '= '}{p_text(p)}"


def _color(index: int) -> str:
  return f"var(--s{index % 10})"


def _against_baseline(results: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
  """Returns one row per model: its summary, and its comparison with the baseline."""
  entries = {
    one["model"]: one["scorers"].get(key)
    for one in results["comparisons"]
    if one["baseline"] == results["baseline"]
  }
  return [
    {"model": model, "summary": of[key], "entry": entries.get(model)}
    for model, of in results["models"].items()
    if key in of
  ]


def _matrix(results: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
  """Returns win rates of each model (row) against each other (column)."""
  found: dict[str, dict[str, Any]] = {}
  for one in results["comparisons"]:
    if (entry := one["scorers"].get(key)) is None:
      continue
    sure = entry["holm"] is not None and entry["holm"] < 0.05
    rate = entry["win_rate"]
    row, column = one["model"], one["baseline"]
    found.setdefault(row, {})[column] = {"rate": rate, "sure": sure}
    found.setdefault(column, {})[row] = {"rate": 1 - rate, "sure": sure}
  return found


def _categories(
  categories: Sequence[Mapping[str, Any]], keys: Sequence[str], models: Sequence[str]
) -> list[dict[str, Any]]:
  """Groups the means of categories by scorer; nothing for a single category."""
  if len({row["category"] for row in categories}) < 2:
    return []
  return [
    {
      "key": key,
      "rows": [
        (
          row["category"].replace("_", " "),
          max(of["n"] for of in row["models"].values()),
          [number(row["models"].get(m, {}).get("mean")) for m in models],
        )
        for row in categories
        if row["scorer"] == key
      ],
    }
    for key in keys
  ]


def _example(
  example: Mapping[str, Any], results: Mapping[str, Any], judge: str | None
) -> dict[str, Any]:
  """Lays out the images of one prompt, and says which models win and lose by the judge."""
  scores = example["scores"]
  judged = scores.get(judge, {}) if judge else {}
  base = judged.get(results["baseline"])
  sides, tags, changes = [], [], {}
  for model, file in example["images"].items():
    badges = [
      (
        key,
        ("yes" if of[model] else "no")
        if results["scorers"][key]["binary"]
        else number(of[model]),
      )
      for key, of in scores.items()
      if model in of
    ]
    change = 0.0
    if base is not None and model in judged:
      change = judged[model] - base
    word = "" if not change else "won" if change > 0 else "lost"
    index = list(results["models"]).index(model)
    changes[index] = change
    if word:
      tags.append(f"{word}-{index}")
    sides.append({"name": model, "badges": badges, "word": word, **_thumbnail(file)})
  return {
    "category": example["category"],
    "seed": example["seed"],
    **report.caption(example["prompt"]),
    "sides": sides,
    "changes": changes,
    "ranks": {},
    "tags": " ".join([*tags, *(["random"] if example["at_random"] else [])]),
  }


def _ranked(examples: list[dict[str, Any]], models: int) -> list[dict[str, Any]]:
  """Adds `ranks` to the examples: of each model, 0 for the example with its largest loss."""
  for index in range(1, models):
    order = sorted(examples, key=lambda example: example["changes"].get(index, 0.0))
    for rank, example in enumerate(order):
      example["ranks"][index] = rank
  return examples


def _thumbnail(file: Any) -> dict[str, Any]:
  with Image.open(file) as image:
    image.load()
    if max(image.size) <= _THUMBNAIL:
      return report.image_of(file.read_bytes())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
  return report.image_of(buffer.getvalue())
