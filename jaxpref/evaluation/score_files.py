"""Scores of judges that jaxpref does not have, read from a file of rows.

The file is parquet, csv with a header, or jsonl. Its columns, in any order: `model`, `seed`,
`scorer`, `version`, `score`, and `prompt_id` or `prompt`; other columns are ignored. Model,
prompt and seed identify an image, as in `scores.parquet` of the evaluation that generated it. A
score that a judge could not give is empty, null or NaN.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpref.errors import UserError, first_line, listed
from jaxpref.evaluation import score_rows

_NEEDED = ("model", "seed", "scorer", "version", "score")
_IMAGE = ["model", "prompt_id", "seed"]
_WHERE = ["prompt_id", "seed", "prompt", "category"]
_LARGEST = 2**63 - 1


def read_scores(path: Path, images: pd.DataFrame) -> pd.DataFrame:
  """Reads a file of scores of known images.

  Args:
    path: of the file, ending in .parquet, .csv or .jsonl.
    images: the images' `model, prompt_id, seed, prompt, category`; further columns and repeated
      rows, as in rows of scores, do not matter.

  Returns:
    Rows with the columns `score_rows.COLUMNS`, in the order of the file. A missing score is
    NaN: name the scorers as `imported` to `score_rows` and `statistics`.

  Raises:
    UserError: the file cannot be read, lacks a column, or has a row that is not a number, not
      of one of the images, or a second one of an image and scorer; the message names the row.
  """
  path = Path(path)
  table = _read(path)
  missing = [name for name in _NEEDED if name not in table.columns]
  by = next((name for name in ("prompt_id", "prompt") if name in table.columns), None)
  if missing or by is None:
    names = [*missing, *([] if by else ["prompt_id or prompt"])]
    raise UserError(
      f"{path} lacks the columns {', '.join(names)} (got {listed(table.columns)})"
    )
  if not table.columns.is_unique:
    raise UserError(f"{path} has two columns {table.columns[table.columns.duplicated()][0]}")
  if not len(table):
    raise UserError(f"{path} has no rows")
  rows = pd.DataFrame(
    {name: _texts(path, table, name) for name in ("model", "scorer", "version")}
  )
  rows["seed"] = _integers(path, table, "seed")
  rows["score"] = _scores(path, table)
  if by == "prompt_id":
    rows[by] = _integers(path, table, by)
  else:
    rows[by] = _texts(path, table, by)
  rows = _of_images(path, rows, images, by)
  twice = rows[rows.duplicated([*_IMAGE, "scorer", "version"])]
  if len(twice):
    row = twice.iloc[0]
    raise UserError(
      f"{path}, row {twice.index[0] + 1}: the score of {row['scorer']}-{row['version']} for "
      f"model {row['model']}, prompt {row['prompt_id']}, seed {row['seed']} occurs twice"
    )
  return rows[list(score_rows.COLUMNS)]


def _read(path: Path) -> pd.DataFrame:
  """Reads the columns of a file as they are; those of a csv file are texts."""
  readers = {".parquet": _read_parquet, ".csv": _read_csv, ".jsonl": _read_jsonl}
  if path.suffix not in readers:
    raise UserError(f"{path} must end in {', '.join(readers)}")
  if not path.is_file():  # reading a pipe would wait for a writer
    raise UserError(f"{path} does not exist or is not a file")
  try:
    return readers[path.suffix](path)
  except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
    raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
  table = pq.ParquetFile(path).read()
  table.validate(full=True)  # texts that are not UTF-8 would fail later
  return table.to_pandas(ignore_metadata=True)


def _read_csv(path: Path) -> pd.DataFrame:
  return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")


def _read_jsonl(path: Path) -> pd.DataFrame:
  lines = path.read_text(encoding="utf-8").split("\n")
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict):
      raise ValueError(f"line {number} must be an object (got {type(row).__name__})")
    rows.append(row)
  columns = dict.fromkeys(name for row in rows for name in row)
  return pd.DataFrame(
    {name: pd.Series([r.get(name) for r in rows], dtype=object) for name in columns}
  )


def _texts(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
  """Returns a column of texts; numbers, as versions often are, are written out."""

  def text(value: Any) -> str | None:
    known = isinstance(value, str | int | float | np.number) and not pd.isna(value)
    return str(value) if known and value != "" else None

  return _known(path, name, table[name], table[name].map(text), "a text")


def _integers(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
  def integer(value: Any) -> int | None:
    try:
      number = int(value) if isinstance(value, str) else value
      whole = int(number)
    except (TypeError, ValueError, OverflowError):
      return None
    return whole if whole == number and 0 <= whole <= _LARGEST else None

  found = _known(path, name, table[name], table[name].map(integer), "an integer from 0")
  return found.astype(np.int64)


def _scores(path: Path, table: pd.DataFrame) -> pd.Series:
  """Returns the scores, NaN for missing ones."""

  def score(value: Any) -> float | None:
    if value is None or value is pd.NA or (isinstance(value, str) and not value.strip()):
      return np.nan
    try:
      number = float(value)
    except (TypeError, ValueError, OverflowError):
      return None
    return None if np.isinf(number) else number

  values = [score(value) for value in table["score"]]
  bad = [i for i, value in enumerate(values) if value is None]
  if bad:
    got = table["score"].iloc[bad[0]]
    raise UserError(
      f"{path}, row {bad[0] + 1}: score must be a finite number (got {_shown(got)})"
    )
  return pd.Series(values, dtype=np.float64)


def _known(path: Path, name: str, given: pd.Series, values: pd.Series, kind: str) -> pd.Series:
  bad = np.flatnonzero(values.isna())
  if len(bad):
    got = given.iloc[bad[0]]
    raise UserError(f"{path}, row {bad[0] + 1}: {name} must be {kind} (got {_shown(got)})")
  return values


def _shown(value: Any) -> str:
  return repr(value.item() if isinstance(value, np.generic) else value)


def _of_images(path: Path, rows: pd.DataFrame, images: pd.DataFrame, by: str) -> pd.DataFrame:
  """Adds what is known of the images: prompt id, prompt and category.

  Raises:
    UserError: a row is of no image, or of several.
  """
  keys = ["model", by, "seed"]
  known = images[["model", *_WHERE]].drop_duplicates(_IMAGE)
  known = known.assign(model=known["model"].astype(str), seed=known["seed"].astype(np.int64))
  clash = known[known.duplicated(keys)]
  if len(clash):
    row = clash.iloc[0]
    raise UserError(
      f"model {row['model']} has several images of {by} {_shown(row[by])}, seed {row['seed']}: "
      "give prompt_id"
    )
  found = rows.merge(known, on=keys, how="left", indicator=True)
  strange = np.flatnonzero(found["_merge"] == "left_only")
  if len(strange):
    row = rows.iloc[strange[0]]
    more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
    raise UserError(
      f"{path}, row {strange[0] + 1}: model {row['model']} has no image of "
      f"{by} {_shown(row[by])}, seed {row['seed']}{more}"
    )
  return found
