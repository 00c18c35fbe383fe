"""The report of a run as one self-contained HTML file.

This module turns numbers into positions and words, and `report.html.j2` lays them out. Images
are data URIs. Plots are inline SVG with the colours of the page's style sheet, so that they
follow the reader's light or dark scheme. A content security policy forbids all requests.
"""

import base64
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from jaxpref.evaluation import comparison_text, panels
from jaxpref.evaluation.paired_tests import TOLERANCE
from jaxpref.evaluation.score_text import number, p_is, p_text, percent
from jaxpref.evaluation.statistics import outcome
from jaxpref.runtime.workdir import write_bytes

_TINY = 128  # images up to this size are enlarged by nearest neighbour
CAPTION = 160  # characters of a prompt that are always shown
_UNFOLDED = 2000  # characters of a prompt that are shown when it is unfolded
_VALUE = 500  # characters of a value of the configuration or the facts
# Control characters, and those that reorder the text after them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write_report(
  path: str | os.PathLike[str],
  *,
  title: str,
  config: Mapping[str, Any],
  results: Mapping[str, dict[str, Any]],
  categories: Sequence[Mapping[str, Any]],
  curves: Mapping[str, panels.Curve],
  examples: Sequence[Mapping[str, Any]],
  facts: Mapping[str, Any],
  headline: str | None = None,
  held_out: bool = True,
  improves: bool = False,
  iterations: Sequence[Mapping[str, str]] = (),
  pairs: Sequence[Mapping[str, Any]] = (),
  said: str = "",
  accuracies: Sequence[Mapping[str, str]] = (),
  diversity: Mapping[str, Any] | None = None,
  warnings: Sequence[str] = (),
) -> None:
  """Writes the report of a run as one self-contained HTML file, atomically.

  Args:
    path: path of the report.
    title: heading of the page.
    config: the resolved configuration as nested mappings.
    results: from `statistics.compare`.
    categories: from `statistics.by_category`.
    curves: (step, value) points of each metric; non-finite values are counted, not shown.
    examples: mappings with `prompt, category, seed`, `base_png, tuned_png` (bytes of a PNG or
      JPEG file) and `scores`, {scorer: {"base": x, "tuned": y}} with the keys of `results`. The
      page says that they were chosen at random.
    facts: label -> value: versions, device, seed, wall time, updates.
    headline: the scorer that the verdict quotes; see `verdict`.
    held_out: whether the model was trained on none of the prompts.
    improves: whether the tuned model's images are improved versions of the base's images.
    iterations: rows of an iterative run's table, column -> text, all with the same columns.
    pairs: examples of the training pairs of an iterative run: mappings with `prompt`, `note`
      and `winner_png, loser_png`.
    said: the page's first sentence; '' for the `verdict` on the results.
    accuracies: rows of the table of a reward model's test, column -> text.
    diversity: from `diversity.compare_diversity`; None if it was not measured.
    warnings: sentences that are shown below the first one.

  Raises:
    ValueError: the headline is unknown, or an image cannot be read.
    OSError: the file cannot be written.
  """
  environment = make_environment()
  environment.filters["p_is"] = _p
  judge = _judge(results, headline) if results else None
  order = sorted(results, key=lambda k: (k != judge, _weight(results, k)))
  html = environment.get_template("report.html.j2").render(
    title=title,
    verdict=said or verdict(results, headline=headline, held_out=held_out),
    accuracies=accuracies,
    diversity=diversity,
    warnings=warnings,
    held_out=held_out,
    remarks=remarks(results, headline=headline),
    state=_state(results, judge),
    judge=judge,
    results={key: results[key] for key in order},
    categories=_category_tables(categories, results, order),
    panels=panels.lay_out(curves),
    panel_width=panels.WIDTH,
    panel_height=panels.HEIGHT,
    examples=[_example(e, results, judge) for e in examples],
    config=[(name, shorten(value, _VALUE)) for name, value in flatten(config)],
    facts={name: shorten(str(value), _VALUE) for name, value in facts.items()},
    improves=improves,
    iterations=iterations,
    pairs=[
      {
        **p,
        **caption(p["prompt"]),
        "sides": [(side, image_of(p[f"{side}_png"])) for side in ("loser", "winner")],
      }
      for p in pairs
    ],
  )
  write_bytes(path, html.encode())


def make_environment() -> jinja2.Environment:
  """Makes the environment of the pages of this package, with filters for numbers."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    finalize=_without_controls,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(number=number, p_text=p_text, tie=_tie)
  environment.filters["diversity_rows"] = comparison_text.diversity_rows
  environment.filters["percent"] = lambda share: _tie(percent(share))
  return environment


def _without_controls(value: Any) -> Any:
  """Replaces characters of a text that change a page's order or that HTML forbids."""
  return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def verdict(
  results: Mapping[str, dict[str, Any]],
  *,
  headline: str | None = None,
  held_out: bool = True,
) -> str:
  """Writes the result of the comparison as one sentence.

  Args:
    results: from `statistics.compare`.
    headline: key of the scorer to quote. By default it is the first by name of those that are
      not binary and did not select the training data, or else the first by name of all.
    held_out: whether the model was trained on none of the prompts.

  Raises:
    ValueError: `headline` is not among the results.
  """
  if not results:
    return "No scorer rated these images: compare them by eye."
  judge = _judge(results, headline)
  entry = results[judge]
  prompts = entry["prompts"]
  kind = "held-out " if held_out else ""
  where = f"On {prompts:,} {kind}prompt{'s' if prompts != 1 else ''}"
  rate, (low, high), result = entry["win_rate"], entry["interval"], outcome(entry)
  side = "base" if result == "lost" else "tuned"
  if result == "lost":
    rate, low, high = 1 - rate, 1 - high, 1 - low
  by = "one prompt gives no interval"
  if entry["p_value"] is not None:
    by = f"95 % interval {percent(low)[:-2]} to {percent(high)}, {_p(entry)}"
  said = f"{judge} prefers the {side} model in {percent(rate)} of the pairs ({by})"
  if entry["selected_training_data"]:
    said += ", but had a part in the training, so it is not evidence"
  if result == "undecided" or entry["selected_training_data"]:
    said = f"it is undecided which model is better: {said}"
  text = f"{where}, {said}"
  for key in results:
    if results[key]["binary"] and key != judge and not results[key]["selected_training_data"]:
      change = outcome(results[key])
      clash = {result, change} == {"won", "lost"}
      text += f"; {'but ' if clash else ''}{_correctness(key, results[key], change)}"
  return text + "."


def remarks(results: Mapping[str, dict[str, Any]], *, headline: str | None = None) -> list[str]:
  """Writes what the verdict leaves out: other scorers, and scorers that do not count."""
  if not results:
    return []
  judge = _judge(results, headline)
  words = {"won": "the tuned model", "lost": "the base model", "undecided": "neither"}
  said = []
  for key, entry in results.items():
    if entry["selected_training_data"]:
      said.append(f"{key} had a part in the training, so it is not evidence.")
    elif key != judge and not entry["binary"]:
      said.append(
        f"{key} prefers {words[outcome(entry)]}: "
        f"{percent(entry['win_rate'])} of the pairs for the tuned model, {_p(entry)}."
      )
  return said


def flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
  """Lists the leaves of a nested mapping as ("a.b", JSON text), in their order."""
  flat = []
  for name, value in config.items():
    if isinstance(value, Mapping):
      flat += flatten(value, f"{prefix}{name}.")
    else:
      flat.append((f"{prefix}{name}", json.dumps(value, default=str)))
  return flat


def shorten(text: str, length: int) -> str:
  """Cuts a text to `length` characters plus an ellipsis, between words if possible."""
  if len(text) <= length:
    return text
  cut = text[:length]
  space = cut.rfind(" ")  # some scripts have no spaces
  return f"{cut[:space] if space >= length // 2 else cut} ..."


def _judge(results: Mapping[str, dict[str, Any]], headline: str | None) -> str:
  if headline is not None:
    if headline not in results:
      raise ValueError(f"headline must be one of {', '.join(results)} (got {headline!r})")
    return headline
  return min(results, key=lambda key: _weight(results, key))


def _weight(results: Mapping[str, dict[str, Any]], key: str) -> tuple[bool, bool, str]:
  return results[key]["selected_training_data"], results[key]["binary"], key


def _state(results: Mapping[str, dict[str, Any]], judge: str | None) -> str:
  if judge is None:
    return "unscored"
  result = outcome(results[judge])
  others = {outcome(e) for e in results.values() if not e["selected_training_data"]}
  if not others:
    return "undecided"
  return "mixed" if {"won", "lost"} <= others | {result} else result


def _p(entry: dict[str, Any]) -> str:
  return p_is(entry["p_value"])


def _tie(text: str) -> str:
  """Keeps numbers and their units or exponents on one line."""
  text = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)
  return re.sub(r" (?=%)|(?<=\bp) (?=[=<])|(?<= [=<]) ", "\N{NO-BREAK SPACE}", text)


def _correctness(key: str, entry: dict[str, Any], change: str) -> str:
  before, after = percent(entry["base"]["mean"]), percent(entry["tuned"]["mean"])
  verb = {"won": "rise", "lost": "fall", "undecided": "go"}[change]
  if change == "undecided" and before == after:
    return f"images judged correct by {key} stay at {after} ({_p(entry)})"
  text = f"images judged correct by {key} {verb} from {before} to {after}"
  return text if change != "undecided" else f"{text}, which may be chance ({_p(entry)})"


def _category_tables(
  categories: Sequence[Mapping[str, Any]],
  results: Mapping[str, dict[str, Any]],
  order: Sequence[str],
) -> list[dict[str, Any]]:
  tables = []
  for scorer in order:
    rows = [row for row in categories if row["scorer"] == scorer]
    if not rows:
      continue
    means = [row[side] for row in rows for side in ("base", "tuned")]
    low, high = min(means), max(means)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    # The axis goes below 0 only if a mean does.
    low, high = low - pad if low < 0 else max(low - pad, 0.0), high + pad
    if results[scorer]["binary"]:
      low, high = 0.0, 1.0
    places = [
      {s: 100 * (row[s] - low) / (high - low) for s in ("base", "tuned")} for row in rows
    ]
    placed = list(zip(rows, places, strict=True))
    tables.append({"scorer": scorer, "low": low, "high": high, "rows": placed})
  return tables


def _example(
  example: Mapping[str, Any],
  results: Mapping[str, dict[str, Any]],
  judge: str | None,
) -> dict[str, Any]:
  scores = example["scores"]
  winner = None
  if judge in scores:
    difference = scores[judge]["tuned"] - scores[judge]["base"]
    if abs(difference) > TOLERANCE:
      winner = "tuned" if difference > 0 else "base"
  sides = []
  for side in ("base", "tuned"):
    badges = []
    for key, pair in scores.items():
      yes_no = isinstance(pair[side], bool) or results.get(key, {}).get("binary")
      text = ("yes" if pair[side] else "no") if yes_no else f"{pair[side]:.3g}"
      badges.append((key, text))
    sides.append({"name": side, "badges": badges, **image_of(example[f"{side}_png"])})
  shown = caption(example["prompt"])
  return {**example, **shown, "sides": sides, "winner": winner}


def caption(prompt: str) -> dict[str, str]:
  """Returns a prompt as shown at first and, if that is cut, as shown when unfolded."""
  whole, unfold = "", "whole prompt"
  if len(prompt) > CAPTION:
    whole = shorten(prompt, _UNFOLDED)
  if len(prompt) > _UNFOLDED:
    unfold = f"beginning of the prompt's {len(prompt):,} characters"
  return {"prompt": shorten(prompt, CAPTION), "whole": whole, "unfold": unfold}


def image_of(data: bytes) -> dict[str, Any]:
  """Returns a PNG or JPEG file as a data URI, with the width and height to show it at.

  Raises:
    ValueError: the file is not such an image.
  """
  try:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
      (width, height), mime = image.size, image.get_format_mimetype()
  except OSError as error:
    raise ValueError("an example must be a PNG or JPEG image") from error
  tiny = max(width, height) <= _TINY
  scale = max(2, 128 // max(width, height)) if tiny else min(1.0, 288 / width)
  return {
    "uri": f"data:{mime};base64,{base64.b64encode(data).decode()}",
    "width": round(width * scale),
    "height": round(height * scale),
    "tiny": tiny,
  }
