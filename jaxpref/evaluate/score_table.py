"""Scores of the images of a comparison, kept in one file per model and scorer."""

import argparse
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxpref import scorers
from jaxpref.data.images import decode
from jaxpref.errors import DamagedError, UserError, count, first_line
from jaxpref.evaluate.candidates import IMAGES
from jaxpref.evaluation import score_rows
from jaxpref.runtime import progress
from jaxpref.runtime.workdir import write_bytes

SCORES = "scores"
_IMAGE = ("prompt_id", "seed", "prompt", "category")
_COLUMNS = {"file": str, "digest": str, "score": float}


def list_images(
  names: Sequence[str], prompts: Sequence[Any], flags: argparse.Namespace
) -> pd.DataFrame:
  """Lists the images of models, whether they exist or not.

  Image `number` of prompt `i` has the seed `--seed + i * images_per_prompt + number` for every
  model, however many devices or processes there are.

  Returns:
    One row for each image: `model, prompt_id, seed, prompt, category, file`. The seed is the
    same for all models; the prompt is what scorers judge, without a model's prefix.

  Raises:
    UserError: a seed does not fit into 32 bits.
  """
  each = flags.images_per_prompt
  if not 0 <= flags.seed < 2**31 - len(prompts) * each:
    raise UserError(
      f"--seed must be at least 0 and below 2^31 minus {count(len(prompts) * each, 'image')}"
    )
  rows = [
    (name, i, flags.seed + i * each + number, prompt.text, prompt.category, folder / file)
    for name in names
    for folder in (flags.out / IMAGES / name,)
    for i, prompt in enumerate(prompts)
    for number in range(each)
    for file in (f"{i:05d}-{number:02d}.png",)
  ]
  return pd.DataFrame(rows, columns=["model", *_IMAGE, "file"])


def add_digests(images: pd.DataFrame) -> pd.DataFrame:
  """Returns the images whose files exist, with the `digest` of each file's content."""
  there = images[[file.exists() for file in images["file"]]]
  digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in there["file"]]
  return there.assign(digest=digests)


def score_images(
  name: str, images: pd.DataFrame, directory: Path, *, share: str, chunk: int
) -> str:
  """Scores the images that have no score yet.

  Args:
    name: of the scorer.
    images: of one model, see `add_digests`.
    directory: gets `<scorer>-<version><share>.parquet`, rewritten after each chunk, so that a
      killed job loses at most one. A score belongs to the content of its file: an image that
      has changed is scored again.
    share: '' or the end of the file's name for a part of the images.
    chunk: number of images that are read at once.

  Returns:
    The scorer's key, "<scorer>-<version>".

  Raises:
    UserError: the scorer is unknown, lacks its weights or does not return numbers.
  """
  ((_, (version, function)),) = scorers.load_scorers([name]).items()
  key = f"{name}-{version}"
  known = read_scores(directory, key)
  missing = [
    (path, prompt, digest)
    for path, prompt, digest in zip(
      images["file"], images["prompt"], images["digest"], strict=True
    )
    if known.get(path.name, ("", 0.0))[0] != digest
  ]
  file = directory / f"{key}{share}.parquet"
  rows = _read(file) if file.exists() else []
  with progress.progress_bar(
    total=len(images),
    initial=len(images) - len(missing),
    desc=f"{name} of {directory.name}",
    unit="image",
  ) as bar:
    for start in range(0, len(missing), chunk):
      part = missing[start : start + chunk]
      pixels = _same_size([decode(path) for path, *_ in part])
      values = scorers.score(name, function, pixels, [prompt for _, prompt, _ in part])
      new = {
        path.name: {"file": path.name, "digest": digest, "score": float(value)}
        for (path, _, digest), value in zip(part, values, strict=True)
      }
      rows = [row for row in rows if row["file"] not in new] + list(new.values())
      _write(file, rows)
      bar.update(len(part))
  return key


def read_scores(directory: Path, key: str) -> dict[str, tuple[str, float]]:
  """Reads the scores of a model's images: file name -> (digest of the content, score).

  Args:
    directory: of the model's scores.
    key: "<scorer>-<version>".

  Raises:
    DamagedError: a file is damaged.
  """
  found: dict[str, tuple[str, float]] = {}
  files = sorted({*directory.glob(f"{key}.parquet"), *directory.glob(f"{key}.*-of-*.parquet")})
  for file in files:
    found |= {row["file"]: (row["digest"], row["score"]) for row in _read(file)}
  return found


def to_rows(images: pd.DataFrame, key: str, directory: Path) -> pd.DataFrame:
  """Joins a model's scores with its images, in the columns of `score_rows.COLUMNS`.

  Args:
    images: of one model, see `list_images`.
    key: "<scorer>-<version>".
    directory: of the model's scores.
  """
  scorer, _, version = key.partition("-")
  scores = read_scores(directory, key)
  rows = images.assign(
    scorer=scorer, version=version, score=[scores[file.name][1] for file in images["file"]]
  )
  return rows[list(score_rows.COLUMNS)]


def _same_size(pixels: list[np.ndarray]) -> Any:
  """Stacks images of one size; leaves others as a list."""
  return np.stack(pixels) if len({p.shape for p in pixels}) == 1 else pixels


def _read(file: Path) -> list[dict[str, Any]]:
  try:
    table = pd.read_parquet(file)[list(_COLUMNS)].astype(_COLUMNS)
  except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
    raise DamagedError(f"{file} is damaged, remove it: {first_line(error)}") from error
  if not np.isfinite(table["score"]).all():
    raise UserError(f"{file} has scores that are not finite: remove it")
  return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
  buffer = io.BytesIO()
  table = pd.DataFrame(rows, columns=list(_COLUMNS)).sort_values("file")
  table.to_parquet(buffer, index=False, engine="pyarrow")
  write_bytes(file, buffer.getvalue())
