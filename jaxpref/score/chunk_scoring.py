"""Scoring of a share of a data set's images, chunk by chunk."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref import scorers
from jaxpref.data.image_scores import Facts
from jaxpref.runtime import progress
from jaxpref.score import image_reader, score_parts
from jaxpref.score.image_reader import ImageReader, Item
from jaxpref.scorers import Scorer

_NOT_FINITE = "a score that is not finite"
_MOST_THREADS = 32


def score_share(
  images: ImageReader,
  functions: Mapping[str, Scorer],
  facts: Mapping[str, Facts],
  out: Path,
  *,
  batch_size: int,
  share: tuple[int, int] = (0, 1),
) -> None:
  """Scores the chunks of a share that are not scored yet, and writes their parts.

  Args:
    images: of the data set.
    functions: scorers by name.
    facts: of the file of each scorer.
    out: directory of the files.
    batch_size: images that are read, and that a scorer gets, at once; the last batch of a chunk
      may have fewer.
    share: number of the share and of all shares; chunk i is in share i modulo their number.

  Raises:
    UserError: the directory holds scores of another data set, or a scorer is at fault.
  """
  number, total = share
  wanted: dict[int, list[str]] = {}  # scorers by chunk
  chunks: list[range] = []
  for name, of in facts.items():
    chunks = score_parts.chunks_of(of)
    for chunk in () if score_parts.is_finished(out, of) else score_parts.missing(out, of):
      if chunk % total == number:
        wanted.setdefault(chunk, []).append(name)
  mine = range(number, len(chunks), total)
  batches = (b for chunk in sorted(wanted) for b in _batches(chunks[chunk], batch_size))
  threads = min(os.cpu_count() or 1, _MOST_THREADS)
  with (
    ThreadPoolExecutor(threads) as decoders,
    progress.progress_bar(
      total=sum(len(chunks[i]) for i in mine),
      initial=sum(len(chunks[i]) for i in mine if i not in wanted),
      desc="scores",
      unit="image",
    ) as bar,
  ):
    found = image_reader.ahead(lambda numbers: images.read(numbers, decoders), batches)
    for chunk in sorted(wanted):
      items: list[Item] = []
      scores: dict[str, list[np.ndarray]] = {name: [] for name in wanted[chunk]}
      for _ in _batches(chunks[chunk], batch_size):
        batch = next(found)
        for name, parts in scores.items():
          parts.append(score_batch(name, functions[name], batch))
        items += [item._replace(image=None) for item in batch]
        bar.update(len(batch))
      for name, parts in scores.items():
        _write(out, facts[name], chunk, items, np.concatenate(parts))


def score_batch(name: str, function: Scorer, batch: Sequence[Item]) -> np.ndarray:
  """Scores the images of a batch that could be read.

  Args:
    name: of the scorer, for messages.
    function: the scorer.
    batch: N images.

  Returns:
    float64 [N]; NaN for an image that could not be read, or whose score is not finite.

  Raises:
    UserError: see `scorers.call`.
  """
  scores = np.full(len(batch), np.nan)
  if not (good := [i for i, item in enumerate(batch) if item.image is not None]):
    return scores
  images: Any = [batch[i].image for i in good]  # of any sizes
  found = scorers.call(name, function, images, [batch[i].prompt for i in good])
  scores[good] = np.where(np.isfinite(found), found, np.nan)
  return scores


def _batches(rows: range, size: int) -> Iterator[range]:
  return (rows[i : i + size] for i in range(0, len(rows), size))


def _write(
  out: Path, facts: Facts, chunk: int, items: Sequence[Item], scores: np.ndarray
) -> None:
  failures = [
    item.failure or (_NOT_FINITE if np.isnan(score) else "")
    for item, score in zip(items, scores, strict=True)
  ]
  score_parts.write_part(
    *(out, facts, chunk),
    places=[(item.row, item.arm) for item in items],
    images=[item.digest for item in items],
    prompts=[item.prompt for item in items],
    scores=scores,
    failures=failures,
  )
