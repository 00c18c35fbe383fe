"""T2I-CompBench's files: images laid out for its programs, and the results that they write.

T2I-CompBench (Huang et al. 2023, https://arxiv.org/abs/2307.06350) judges eight categories of
300 prompts by several models, each a program of https://github.com/Karine-Huang/T2I-CompBench.
Each reads a folder `samples` with files `{prompt}_{six digits}.png` and writes
`vqa_result.json`, a list of `{question_id, answer}`, where the question is the file's number.
Here each category has a directory of its own.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxpref.data import prompt_files
from jaxpref.errors import UserError, first_line
from jaxpref.evaluation import paired_tests, png_links
from jaxpref.evaluation.prompt_sets import Prompt
from jaxpref.evaluation.score_rows import COLUMNS

VERSION = "1"
# The judge of each category, whose answers have a range of their own, and its result's folder.
_BLIP = ("compbench.blip_vqa", "annotation_blip")
JUDGES = {
  **dict.fromkeys(("color", "shape", "texture"), _BLIP),
  "spatial": ("compbench.unidet_2d", "labels/annotation_obj_detection_2d"),
  "3d_spatial": ("compbench.unidet_3d", "labels/annotation_obj_detection_3d"),
  "numeracy": ("compbench.unidet_numeracy", "annotation_num"),
  "non_spatial": ("compbench.clip", "annotation_clip"),
  "complex": ("compbench.three_in_one", "annotation_3_in_1"),
}
_log = logging.getLogger(__name__)


def write_layout(
  out: Path, prompts: Sequence[Prompt], images: Sequence[Sequence[Path]]
) -> None:
  """Lays images out as `OUT/{category}/samples/{prompt}_{number}.png`.

  Args:
    out: a directory that is new or holds this layout.
    prompts: from `load_prompts("t2i-compbench:FOLDER")`, N.
    images: PNG files of each prompt, N times the same number.

  Raises:
    UserError: a prompt has no category of T2I-CompBench or cannot be part of a file's name, a
      file is not PNG, the directory has other images, or it cannot be written.
  """
  if len(prompts) != len(images) or len({len(files) for files in images}) > 1:
    raise ValueError("all prompts must have the same number of images")
  links: dict[Path, dict[str, Path]] = defaultdict(dict)
  for prompt, files in zip(prompts, images, strict=True):
    if prompt.category not in JUDGES:
      raise UserError(
        f"the prompt {prompt.text!r} is not of T2I-CompBench: {prompt.category!r}"
      )
    if "_" in prompt.text or "/" in prompt.text:
      raise UserError(
        f"the prompt {prompt.text!r} has '_' or '/', which names of files separate"
      )
    of = links[out / prompt.category / "samples"]
    for file in files:
      of[f"{prompt.text}_{len(of):06d}.png"] = file
  for folder, of in links.items():
    png_links.check_only(folder, of)
    for name, file in of.items():
      png_links.link(file, folder / name)


def read_results(
  out: Path, prompts: Sequence[Prompt], *, images_per_prompt: int, model: str
) -> pd.DataFrame:
  """Reads the results of the categories that are judged, as rows of scores.

  Args:
    out: the directory of `write_layout`.
    prompts: as for `write_layout`.
    images_per_prompt: number of images of each prompt.
    model: name of the model whose images were judged.

  Returns:
    Rows with the columns `score_rows.COLUMNS`; `seed` is the number of a prompt's image, which
    pairs the images of two models.

  Raises:
    UserError: no category is judged, or a result is damaged or of other images.
  """
  ids = defaultdict(list)
  for number, prompt in enumerate(prompts):
    ids[prompt.category].append(number)
  rows: list[tuple] = []
  missing = []
  for category, of in ids.items():
    scorer, folder = JUDGES[category]
    file = out / category / folder / "vqa_result.json"
    if not file.exists():
      missing.append(category)
      continue
    answers = _read_answers(file, len(of) * images_per_prompt)
    for k, answer in enumerate(answers):
      number, seed = of[k // images_per_prompt], k % images_per_prompt
      row = (model, number, seed, prompts[number].text, category, scorer, VERSION, answer)
      rows.append(row)
  if not rows:
    raise UserError(f"{out} has no results: none of {', '.join(missing)} is judged")
  if missing:
    _log.warning("%s: not judged: %s", out, ", ".join(missing))
  return pd.DataFrame(rows, columns=list(COLUMNS))


def _read_answers(file: Path, count: int) -> list[float]:
  """Returns the answers of a result by question, [count]."""
  try:
    found = json.loads(prompt_files.read_utf8(file, shown=str(file)))
    # The programs write answers as numbers or as text.
    answers = {int(one["question_id"]): float(one["answer"]) for one in found}
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(
      f"{file} is damaged, or not a list of question_id and answer: {first_line(error)}"
    ) from error
  if len(found) != count or answers.keys() != set(range(count)):
    raise UserError(
      f"{file} has {len(answers)} answers of {len(found)}; there are {count} images"
    )
  if bad := [k for k, answer in answers.items() if not math.isfinite(answer)]:
    raise UserError(f"{file}: the answer of question {bad[0]} is {answers[bad[0]]}")
  return [answers[k] for k in range(count)]


def summarize_results(
  rows: pd.DataFrame, *, seed: int = 0, resamples: int = 10_000
) -> dict[str, dict[str, Any]]:
  """Computes the mean of each category, with a 95 % bootstrap interval over prompts.

  Args:
    rows: of one model, from `read_results`.
    seed: of the bootstrap.
    resamples: number of bootstrap resamples.

  Returns:
    category -> JSON values 'mean', 'interval' [low, high], 'images', 'prompts' and 'scorer', in
    the order of `JUDGES`. T2I-CompBench has no mean over categories.
  """
  found = {}
  for category, (scorer, _) in JUDGES.items():
    of = rows[rows["category"] == category].groupby("prompt_id")["score"].agg(["sum", "size"])
    if of.empty:
      continue
    sums, counts = of["sum"].to_numpy()[:, None], of["size"].to_numpy()
    (interval,) = paired_tests.bootstrap_interval(sums, counts, seed=seed, resamples=resamples)
    found[category] = {
      **{"mean": float(sums.sum() / counts.sum()), "interval": interval, "scorer": scorer},
      **{"images": int(np.sum(counts)), "prompts": len(of)},
    }
  return found
