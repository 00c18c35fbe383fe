"""Rows of scores: their columns, their checks, and the compared values.

A row is one score of one image, `(model, prompt_id, seed, scorer, version, score)`, with the
image's `prompt` and `category`; higher scores are better. `check_rows` adds two columns: `key`,
"<scorer>-<version>", and `unit`, the smallest `prompt_id` with the same text, so that prompts
that occur twice are one unit.
"""

import os
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd

from jaxpref.runtime.workdir import write_bytes

COLUMNS = ("model", "prompt_id", "seed", "prompt", "category", "scorer", "version", "score")
IMAGE = ["unit", "prompt_id", "seed"]  # identifies an image of a model
UNITS = ("image", "mean", "single", "median:<scorer>")


def scorers_of(rows: pd.DataFrame) -> dict[str, str]:
  """Returns the scorers of checked rows as key -> name, sorted by key."""
  pairs = rows[["key", "scorer"]].drop_duplicates().sort_values("key")
  return dict(zip(pairs["key"], pairs["scorer"].astype(str), strict=True))


def named(names: Collection[str], scorers: Mapping[str, str]) -> set[str]:
  """Returns the keys of `scorers`, key -> name, that `names` hold as a key or as a name."""
  return {key for key, name in scorers.items() if key in names or name in names}


def check_rows(rows: pd.DataFrame, *, imported: Collection[str] = ()) -> pd.DataFrame:
  """Returns the rows with the columns `key` and `unit`.

  Args:
    rows: with the columns `COLUMNS`.
    imported: keys or names of scorers whose scores may be NaN.

  Raises:
    ValueError: a column is missing, a score is not finite, a row occurs twice, or a prompt id
      has two texts; the message names the row.
  """
  missing = [name for name in COLUMNS if name not in rows.columns]
  if missing:
    raise ValueError(f"rows lack the columns {', '.join(missing)}")
  rows = rows.assign(
    score=rows["score"].astype(np.float64),
    version=rows["version"].astype(str),
    key=rows["scorer"].astype(str) + "-" + rows["version"].astype(str),
  )
  may_lack = named(imported, scorers_of(rows))
  bad = rows[~np.isfinite(rows["score"]) & ~(rows["score"].isna() & rows["key"].isin(may_lack))]
  if len(bad):
    raise ValueError(f"{_name(bad.iloc[0])} must be finite (got {bad.iloc[0]['score']})")
  twice = rows[rows.duplicated(["model", "prompt_id", "seed", "key"])]
  if len(twice):
    raise ValueError(f"{_name(twice.iloc[0])} occurs twice")
  texts = rows[["prompt_id", "prompt"]].drop_duplicates()
  clash = texts[texts["prompt_id"].duplicated(keep=False)]
  if len(clash):
    first, second = clash[clash["prompt_id"] == clash["prompt_id"].iloc[0]]["prompt"].iloc[:2]
    raise ValueError(
      f"prompt {clash['prompt_id'].iloc[0]} has two texts: {first!r} and {second!r}"
    )
  return rows.assign(unit=rows.groupby("prompt", dropna=False)["prompt_id"].transform("min"))


def count_merged(rows: pd.DataFrame) -> int:
  """Counts the prompts of checked rows that repeat another prompt's text."""
  return int(rows["prompt_id"].nunique() - rows["unit"].nunique())


def check_unit(unit: str, scorers: Mapping[str, str]) -> str | None:
  """Returns the key of the scorer that chooses the median image, if the unit has one.

  Args:
    unit: one of `UNITS`.
    scorers: all of them, key -> name.

  Raises:
    ValueError: the unit is unknown, or its scorer is unknown or has two versions.
  """
  kind, colon, scorer = unit.partition(":")
  if kind != "median" or not colon:
    if unit not in UNITS:
      raise ValueError(f"unit must be one of {', '.join(UNITS)} (got {unit!r})")
    return None
  found = named((scorer,), scorers)
  if len(found) != 1:
    raise ValueError(f"{unit}: the scorer must be one of {', '.join(sorted(scorers))}")
  return found.pop()


def median_images(scores: pd.Series) -> pd.MultiIndex:
  """Returns for each unit the image with the median score.

  Of an even number of images it is the one just below the middle; equal scores are ordered by
  prompt id and seed.

  Args:
    scores: of one model and scorer, indexed by `IMAGE`.
  """
  ordered = scores.sort_index().sort_values(kind="stable").reset_index()
  units = ordered.groupby("unit")["unit"]
  middle = units.cumcount() == (units.transform("size") - 1) // 2
  return ordered[middle].set_index(IMAGE).sort_index().index


def unit_values(scores: pd.Series, unit: str, chosen: pd.MultiIndex | None) -> pd.Series:
  """Reduces one model's scores to those that are compared.

  Args:
    scores: of one model and scorer, indexed by `IMAGE`.
    unit: one of `UNITS`: "image" keeps all images; "mean" takes the mean of a prompt's images;
      "single" the first image of a prompt, by prompt id and seed; "median:<scorer>" the image
      that `median_images` chose by that scorer.
    chosen: those images.

  Returns:
    Scores indexed by `IMAGE` if the unit is "image", else by unit. An image of `chosen`
    without a score has NaN.
  """
  if unit == "image":
    return scores
  if unit == "mean":
    return scores.groupby(level="unit").mean()
  if chosen is None:
    return scores.sort_index().groupby(level="unit").first()
  return scores.reindex(chosen).droplevel(["prompt_id", "seed"])


def write_rows(
  path: str | os.PathLike[str], rows: pd.DataFrame, *, imported: Collection[str] = ()
) -> None:
  """Writes the rows atomically as parquet, with the columns `COLUMNS`.

  Raises:
    ValueError: for the same reasons as in `check_rows`.
  """
  table = check_rows(rows, imported=imported)[list(COLUMNS)]
  write_bytes(path, table.to_parquet(index=False, engine="pyarrow"))


def _name(row: pd.Series) -> str:
  where = f"model {row['model']}, prompt {row['prompt_id']}, seed {row['seed']}"
  return f"the score of {row['key']} for {where}"
