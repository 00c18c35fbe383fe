"""Parts of files of scores: one for each chunk of images, which processes write in any order.

A part is written atomically, so that a chunk is either scored or not; the file is joined from
its parts when all are there.
"""

import contextlib
import io
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpref.data import image_scores
from jaxpref.data.image_scores import ADVICE, Facts, file_of
from jaxpref.errors import UserError, first_line, storage_error
from jaxpref.runtime import workdir

CHUNK = 1024  # images of a part
_PARTS = "parts"


def chunks_of(facts: Facts) -> list[range]:
  """Returns the images of each part."""
  return [range(i, min(i + CHUNK, facts.images)) for i in range(0, facts.images, CHUNK)]


def is_finished(out: Path, facts: Facts) -> bool:
  """Tells whether the file of a scorer is there.

  Raises:
    UserError: the file, or a part of it, is of another data set.
  """
  if (file := file_of(out, facts)).exists():
    image_scores.check(file, facts)
    return True
  if part := next(iter(sorted(_parts_of(out, facts).glob("*.parquet"))), None):
    image_scores.check(part, facts)
  return False


def missing(out: Path, facts: Facts) -> set[int]:
  """Returns the numbers of the chunks without a part."""
  there = {path.name for path in _parts_of(out, facts).glob("*.parquet")}
  return {i for i in range(len(chunks_of(facts))) if _part_name(i) not in there}


def write_part(
  out: Path,
  facts: Facts,
  chunk: int,
  *,
  places: Iterable[tuple[int, int]],
  images: Sequence[str],
  prompts: Sequence[str],
  scores: np.ndarray,
  failures: Sequence[str],
) -> None:
  """Writes the part of a chunk atomically.

  Args:
    out: directory of the files.
    facts: of the file.
    chunk: number of the chunk, with N rows.
    places: row and arm of each image.
    images: digests of the image files; '' if one cannot be read.
    prompts: of the images.
    scores: float64 [N]; NaN for none.
    failures: reasons why there is not a score, or ''.

  Raises:
    UserError: the file cannot be written.
  """
  row, arm = zip(*places, strict=True)
  columns = {
    **{"row": row, "arm": arm, "image": images, "prompt": prompts},
    "scorer": [facts.scorer] * len(row),
    "version": [facts.version] * len(row),
    "score": [None if np.isnan(score) else score for score in scores.tolist()],
    "failure": [failure or None for failure in failures],
  }
  with io.BytesIO() as buffer:
    pq.write_table(
      pa.table(columns, schema=image_scores.schema_of(facts)), buffer, compression="zstd"
    )
    workdir.write_bytes(_parts_of(out, facts) / _part_name(chunk), buffer.getvalue())


def merge(out: Path, facts: Facts) -> bool:
  """Writes the file of a scorer if all of its parts are there, and removes them.

  Several processes may do so at the same time: they write the same file.

  Returns:
    Whether the file is there.

  Raises:
    UserError: a part is damaged, or the file cannot be written.
  """
  file, parts = file_of(out, facts), _parts_of(out, facts)
  if not missing(out, facts):
    temporary = parts / f".{uuid.uuid4().hex}.tmp"
    try:
      with pq.ParquetWriter(
        temporary, image_scores.schema_of(facts), compression="zstd"
      ) as writer:
        for i, rows in enumerate(chunks_of(facts)):
          writer.write_table(_read_part(parts / _part_name(i), facts, len(rows)))
      temporary.replace(file)
    except (OSError, UserError) as error:
      # Another process may have been faster, and has removed the parts.
      if not file.exists():
        if isinstance(error, UserError):
          raise
        raise storage_error(f"cannot write {file}: {error}", error) from error
  if not file.exists():
    return False
  shutil.rmtree(parts, ignore_errors=True)
  with contextlib.suppress(OSError):  # the parts of other scorers may be there
    parts.parent.rmdir()
  return True


def _read_part(path: Path, facts: Facts, rows: int) -> pa.Table:
  image_scores.check(path, facts)
  try:
    table = pq.read_table(path, page_checksum_verification=True)
  except pa.ArrowException as error:
    raise UserError(f"{path} is damaged: {first_line(error)}; {ADVICE}") from error
  if len(table) != rows:
    raise UserError(f"{path} is damaged: it has {len(table)} rows, not {rows}; {ADVICE}")
  return table


def _parts_of(out: Path, facts: Facts) -> Path:
  return out / _PARTS / facts.key()


def _part_name(chunk: int) -> str:
  return f"{chunk:06d}.parquet"
