"""GenEval's files: images laid out for its program, and the results that it writes.

GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513) judges with a detector whether
images show the objects, counts, colours and positions of 553 prompts. Its program runs in an
environment of its own, https://github.com/djghosh13/geneval:

  python evaluation/evaluate_images.py OUT --outfile results.jsonl --model-path DETECTOR

It reads what `write_layout` writes, and `read_results` reads what it writes. The overall score
is the plain mean of the tasks' shares of correct images, as in its `summary_scores.py`.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxpref.data import prompt_files
from jaxpref.errors import UserError, count, first_line
from jaxpref.evaluation import png_links
from jaxpref.evaluation.prompt_sets import Prompt
from jaxpref.evaluation.score_rows import COLUMNS
from jaxpref.runtime.workdir import write_text

SCORER, VERSION = "geneval", "1"
TASKS = {
  "single_object": "single object",
  "two_object": "two objects",
  "counting": "counting",
  "colors": "colors",
  "position": "position",
  "color_attr": "color attribution",
}
_NAME = re.compile(r"(?:.*[/\\])?(\d+)[/\\]samples[/\\](\d+)\.png")
_TYPES = {"filename": str, "tag": str, "prompt": str, "correct": bool}
_log = logging.getLogger(__name__)


def write_layout(
  out: Path, prompts: Sequence[Prompt], images: Sequence[Sequence[Path]]
) -> None:
  """Lays images out as GenEval's program reads them.

  Writes `OUT/00000/metadata.jsonl` and `OUT/00000/samples/0000.png`, ... for the first prompt,
  and so on. Images are hard links, or copies where links are not possible.

  Args:
    out: a directory that is new or holds this layout.
    prompts: from `load_prompts("geneval")`, N.
    images: PNG files of each prompt, N times at least one.

  Raises:
    UserError: a prompt has no metadata of GenEval, a file is not PNG, the directory has other
      images, or it cannot be written.
  """
  if len(prompts) != len(images):
    raise ValueError(f"{len(prompts)} prompts have images of {len(images)}")
  for prompt in prompts:
    if not {"tag", "include", "prompt"} <= prompt.metadata.keys():
      raise UserError(
        f"the prompt {prompt.text!r} is not of GenEval: it has no tag and objects"
      )
  for number, (prompt, files) in enumerate(zip(prompts, images, strict=True)):
    folder = out / f"{number:05d}"
    samples = folder / "samples"
    names = [f"{k:04d}.png" for k in range(len(files))]
    png_links.check_only(samples, names)
    write_text(folder / "metadata.jsonl", json.dumps(prompt.metadata) + "\n")
    for name, file in zip(names, files, strict=True):
      png_links.link(file, samples / name)


def read_results(
  path: Path, *, model: str, seeds: Sequence[Sequence[int]] | None = None
) -> pd.DataFrame:
  """Reads the results of GenEval's program as rows of scores, 1.0 for a correct image.

  Args:
    path: `results.jsonl`.
    model: name of the model whose images were judged.
    seeds: of each prompt's images; by default an image's number among them, which pairs the
      images of two models.

  Returns:
    Rows with the columns `score_rows.COLUMNS`, sorted by prompt and image. `prompt_id` is the
    number of the prompt's folder, `category` its task.

  Raises:
    UserError: the file is damaged or not GenEval's, or an image is judged twice.
  """
  text = prompt_files.read_utf8(path, shown=str(path))
  rows = []
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    where = f"{path} line {number}"
    found = _checked(line, where)
    match = _NAME.fullmatch(found["filename"])
    if match is None:
      raise UserError(f"{where}: filename must end with NNNNN/samples/NNNN.png")
    prompt, image = int(match[1]), int(match[2])
    try:
      seed = image if seeds is None else int(seeds[prompt][image])
    except IndexError:
      raise UserError(f"{where}: {found['filename']} is not one of the images") from None
    key = (model, prompt, seed, found["prompt"], found["tag"], SCORER, VERSION)
    rows.append((*key, float(found["correct"])))
  if not rows:
    raise UserError(f"{path} holds no results")
  table = pd.DataFrame(rows, columns=list(COLUMNS)).sort_values(
    ["prompt_id", "seed"], ignore_index=True
  )
  if (twice := table.duplicated(["prompt_id", "seed"])).any():
    first = table[twice].iloc[0]
    raise UserError(f"{path} judges image {first['seed']} of prompt {first['prompt_id']} twice")
  counts = table.groupby("prompt_id").size()
  if counts.nunique() > 1:
    fewer = int((counts < counts.max()).sum())
    _log.warning("%s: %s with fewer than %d images", path, count(fewer, "prompt"), counts.max())
  return table


def _checked(line: str, where: str) -> dict[str, Any]:
  try:
    found = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} is damaged: {first_line(error)}") from error
  if not isinstance(found, dict):
    raise UserError(f"{where} is not an object")
  for name, kind in _TYPES.items():
    if not isinstance(found.get(name), kind):
      raise UserError(f"{where}: {name} must be {kind.__name__}, got {found.get(name)!r:.100}")
  if found["tag"] not in TASKS:
    raise UserError(
      f"{where}: tag must be one of {', '.join(TASKS)}, got {found['tag']!r:.100}"
    )
  return found


def summarize_results(
  rows: pd.DataFrame, *, seed: int = 0, resamples: int = 10_000
) -> dict[str, Any]:
  """Computes GenEval's numbers of one model, with 95 % bootstrap intervals.

  The bootstrap resamples prompts with all their images, within each task, because images of a
  prompt are not independent and the tasks are fixed.

  Args:
    rows: from `read_results`.
    seed: of the bootstrap.
    resamples: number of bootstrap resamples.

  Returns:
    JSON values: 'overall', the plain mean of the tasks' shares; 'correct_images' and
    'correct_prompts', the shares of correct images and of prompts with at least one; 'images'
    and 'prompts', their numbers; 'intervals' of the three shares by name; and 'tasks' in
    GenEval's order, each with 'share', 'interval', 'correct', 'images' and 'prompts'. An
    interval is [low, high].
  """
  by_prompt = rows.groupby(["category", "prompt_id"])["score"].agg(["sum", "size"])
  rng = np.random.default_rng(seed)
  tasks: dict[str, dict[str, Any]] = {}
  shares: list[np.ndarray] = []
  totals: dict[str, list[np.ndarray]] = {"correct": [], "images": [], "solved": []}
  for task in TASKS:
    if task not in by_prompt.index.get_level_values(0):
      continue
    of = by_prompt.loc[task]
    right, size = of["sum"].to_numpy(float), of["size"].to_numpy(float)
    chosen = rng.integers(len(of), size=(resamples, len(of)))
    # The first row is the data itself.
    sums, counts = (np.append(x.sum(), x[chosen].sum(axis=1)) for x in (right, size))
    any_right = np.append((right > 0).sum(), (right > 0)[chosen].sum(axis=1))
    shares.append(sums / counts)
    for name, values in (("correct", sums), ("images", counts), ("solved", any_right)):
      totals[name].append(values)
    tasks[task] = {
      **{"share": float(shares[-1][0]), "interval": _interval(shares[-1][1:])},
      **{"correct": int(right.sum()), "images": int(size.sum()), "prompts": len(of)},
    }
  correct, images, solved = (np.sum(values, axis=0) for values in totals.values())
  found = {
    "overall": np.mean(shares, axis=0),
    "correct_images": correct / images,
    "correct_prompts": solved / len(by_prompt),
  }
  return {
    **{name: float(values[0]) for name, values in found.items()},
    **{"images": len(rows), "prompts": len(by_prompt)},
    "intervals": {name: _interval(values[1:]) for name, values in found.items()},
    "tasks": tasks,
  }


def _interval(values: np.ndarray) -> list[float]:
  low, high = np.quantile(values, [0.025, 0.975])
  return [float(low), float(high)]


def to_text(found: Mapping[str, Any]) -> str:
  """Formats the numbers of `summarize_results` as a table for the terminal."""

  def line(name: str, share: float, interval: Sequence[float], of: str = "") -> str:
    low, high = interval
    return f"{name:<18} {100 * share:5.1f} % ({100 * low:.1f} to {100 * high:.1f} %) {of}"

  lines = [
    line(TASKS[task], e["share"], e["interval"], f"{e['correct']} of {e['images']} images")
    for task, e in found["tasks"].items()
  ]
  words = {
    "overall": f"mean of {len(found['tasks'])} tasks",
    "correct_images": f"of {found['images']} images",
    "correct_prompts": f"of {found['prompts']} prompts, any image",
  }
  for name, of in words.items():
    label = name.replace("_", " ")
    lines.append(line(label, found[name], found["intervals"][name], of))
  return "\n".join(text.rstrip() for text in lines)
