"""Prompt sets of published evaluations by name, files of prompts, and single prompts.

`geneval` and `partiprompts` are part of the package: the files in `prompt_data` are as they
were published, with their licences beside them. Of the other sets jaxpref knows where they are
published and how many prompts they have; the user names their files, `drawbench:PATH`.

A set keeps its repeated prompts, and its prompts keep outer spaces: prompt i is row i of the
published file.
"""

import csv
import difflib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpref.data import bad_rows, parquet, prompt_files
from jaxpref.data.sources import pickapic
from jaxpref.errors import UserError, first_line
from jaxpref.evaluation.published_sets import SETS
from jaxpref.runtime.paths import user_path
from jaxpref.scorers import UNCATEGORIZED
from jaxpref.shapes import prompts as shapes_prompts

_log = logging.getLogger(__name__)
_SHIPPED = Path(__file__).parent / "prompt_data"
_SHAPES = "shapes"
_NUM_SHAPES = 150  # held-out prompts of the shapes world by default
# Columns in any case of letters; the first that a row has.
_TEXT = ("prompt", "prompts", "caption", "text")
_CATEGORY = ("category", "tag")


class Prompt(NamedTuple):
  """A prompt of a set.

  Attributes:
    text: the prompt.
    category: by which reports group.
    metadata: the row of the published file as JSON values; empty for a line of text.
  """

  text: str
  category: str
  metadata: dict[str, Any]


def load_prompts(name: str, *, seed: int = 0) -> list[Prompt]:
  """Loads the prompts of a set, of a file, or a single one.

  Args:
    name: a name in `SETS`, with `:PATH` if the set is not part of the package; 'shapes' or
      'shapes:N' for N held-out prompts of the shapes world; the path of a file: text with one
      prompt per line, or a .csv, .tsv, .json, .jsonl or .parquet file with prompts and perhaps
      categories; or a prompt.
    seed: selects the prompts of the shapes world.

  Raises:
    UserError: the set needs a path, or the file cannot be read or has no prompt.
  """
  if not name.strip():
    raise UserError("no prompts are named: the text is empty")
  known, colon, rest = name.strip().partition(":")
  if known == _SHAPES and (not colon or rest.isdecimal()):
    return _of_shapes(int(rest or _NUM_SHAPES), seed)
  if known in SETS:
    return _of_set(known, rest)
  if (path := prompt_files.path_in(name.strip())) is not None:
    return _read(path, UNCATEGORIZED)
  # A misspelt set would otherwise be taken for a prompt of one word.
  if near := difflib.get_close_matches(known.lower(), SETS, n=1, cutoff=0.8):
    raise UserError(f"no prompt set {known!r}; did you mean {near[0]!r}?")
  return [Prompt(_decoded(name.strip()), UNCATEGORIZED, {})]


def choose_prompts(
  source: str, num_prompts: int, captions: Sequence[str], *, seed: int
) -> list[str]:
  """Chooses the prompts of a run's evaluation.

  Args:
    source: 'shapes' for held-out prompts of the shapes world, 'captions' for the captions of
      the training images, or a set or a file as for `load_prompts`.
    num_prompts: the largest number of prompts.
    captions: of the training images, each once.
    seed: selects prompts if the source has more than `num_prompts`.

  Raises:
    UserError: the set or the file cannot be read or has no prompt, or the shapes world has
      fewer than `num_prompts`.
  """
  if source == _SHAPES:
    try:
      return shapes_prompts.held_out(num_prompts, seed=seed)
    except ValueError as error:
      raise UserError(f"evaluate.num_prompts: {error}") from error
  if not source:
    raise UserError("evaluate.prompts is empty")
  found: Sequence[str]
  if source == "captions":
    found = captions
  else:
    try:
      found = list(dict.fromkeys(prompt.text for prompt in _of_run(source, seed)))
    except UserError as error:
      raise UserError(f"evaluate.prompts: {error}") from error
  order = np.random.default_rng(seed).permutation(len(found))
  return [found[i] for i in order[:num_prompts]]


def _of_run(source: str, seed: int) -> list[Prompt]:
  """Loads a set or a file; unlike `load_prompts` no prompt, which may be a misspelt file."""
  known, _, rest = source.strip().partition(":")
  if known in SETS or (known == _SHAPES and rest.isdecimal()):
    return load_prompts(source, seed=seed)
  return _read(user_path(source), UNCATEGORIZED)


def summarize(prompts: Sequence[Prompt]) -> dict[str, Any]:
  """Counts prompts, as JSON values: 'prompts', 'different' texts, and 'categories'."""
  categories = Counter(prompt.category for prompt in prompts)
  different = len({prompt.text for prompt in prompts})
  return {"prompts": len(prompts), "different": different, "categories": dict(categories)}


def _of_shapes(count: int, seed: int) -> list[Prompt]:
  try:
    texts = shapes_prompts.held_out(count, seed=seed)
  except ValueError as error:
    raise UserError(f"shapes:{count}: {error}") from error
  if not texts:
    raise UserError("shapes:0 holds no prompt")
  return [Prompt(text, shapes_prompts.parse(text).category, {}) for text in texts]


def _of_set(name: str, given: str) -> list[Prompt]:
  """Loads the prompts of a known set and warns of a count that is not the published one."""
  about = SETS[name]
  if not given and not about.file:
    raise UserError(
      f"the prompts of {name} are not part of jaxpref: name their "
      f"{'folder' if about.parts else 'file'} as {name}:PATH; published: {about.where}; "
      f"licence: {about.licence}"
    )
  path = user_path(given) if given else _SHIPPED / about.file
  if about.parts and path.is_dir():
    found = [p for part, f in about.parts.items() for p in _read(path / f, part)]
  elif about.split and path.is_dir():
    table = pickapic.open_pickapic(str(path), "captions", split=about.split)
    found = [_prompt_of(table[i], table.where(i), name) for i in range(len(table))]
  else:
    part = next((part for part, f in about.parts.items() if f == path.name), name)
    found = _read(path, part)
  if len(found) not in about.rows:
    _log.warning("%s: %s has %d prompts, not %d", name, path, len(found), about.rows[0])
  elif about.different and (n := summarize(found)["different"]) != about.different:
    _log.warning("%s: %s has %d different prompts, not %d", name, path, n, about.different)
  return found


def _read(path: Path, category: str) -> list[Prompt]:
  """Reads the prompts of a file, in the category if its rows have none.

  Raises:
    UserError: the file cannot be read, a row has no prompt, or the file is empty.
  """
  if path.is_dir():
    raise UserError(f"{path} is a folder: name the file with the prompts")
  if path.suffix.lower() == ".parquet":
    rows: Iterable[Any] = _parquet_rows(path)
  else:
    text = prompt_files.read_utf8(path, shown=str(path))
    rows = _rows_of(path, text)
  found = [_prompt_of(row, f"{path} row {i}", category) for i, row in enumerate(rows, 1)]
  if not found:
    raise UserError(f"{path} holds no prompt")
  return found


def _rows_of(path: Path, text: str) -> Iterator[Any]:
  """Yields the rows of a text file: texts or mappings."""
  try:
    match path.suffix.lower():
      case ".csv":
        yield from _table_rows(csv.DictReader(io.StringIO(text, newline=""), strict=True))
      case ".tsv":  # quotes are characters: PartiPrompts has a prompt that begins with one
        lines = io.StringIO(text, newline="")
        yield from _table_rows(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
      case ".jsonl":
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
      case ".json":
        found = json.loads(text)
        if not isinstance(found, list | dict):
          raise UserError(f"{path} is neither a list of prompts nor an object with them")
        yield from found.values() if isinstance(found, dict) else found
      case _:
        yield from (line.strip() for line in text.split("\n") if line.strip())
  except (ValueError, RecursionError, csv.Error) as error:
    raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def _table_rows(reader: csv.DictReader) -> Iterator[Mapping[str, Any]]:
  """Yields the rows of a table; the fields of each must be those of the header."""
  for row in reader:
    if None in row or None in row.values():
      raise ValueError(f"line {reader.line_num} has another number of fields than the header")
    yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
  """Yields the prompts and categories of a parquet file; reads no other column."""
  there = parquet.open_file(path, {}).schema_arrow.names
  kinds = {n: k for of, k in ((_TEXT, "text"), (_CATEGORY, "name")) if (n := _find(there, of))}
  if "text" not in kinds.values():
    raise UserError(f"{path} has none of the columns {', '.join(_TEXT)}")
  opened = parquet.open_file(path, kinds)
  for group in range(opened.num_row_groups):
    columns = parquet.read_group(opened, path, group, kinds)
    for values in zip(*columns.values(), strict=True):
      yield dict(zip(columns, values, strict=True))


def _find(names: Iterable[Any], wanted: Sequence[str]) -> str:
  """Returns the first wanted column in any case of letters, or ''."""
  lower = {name.lower(): name for name in names if isinstance(name, str)}
  return next((lower[name] for name in wanted if name in lower), "")


def _prompt_of(row: Any, where: str, category: str) -> Prompt:
  try:
    if isinstance(row, str):
      return Prompt(bad_rows.caption_of(row, "prompt"), category, {})
    if not isinstance(row, Mapping):
      raise bad_rows.BadRow("neither a text nor an object with a prompt")
    if not (column := _find(row, _TEXT)):
      raise bad_rows.BadRow(f"none of the columns {', '.join(_TEXT)}")
    text = bad_rows.caption_of(row[column], column)
    metadata = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    of = metadata.get(_find(row, _CATEGORY))
    return Prompt(text, category if of in (None, "") else str(of), metadata)
  except (bad_rows.BadRow, UnicodeError) as error:
    raise UserError(f"{where}: {error}") from error


def _decoded(text: str) -> str:
  """Decodes the bytes that Python escapes in the arguments of a C locale."""
  try:
    return text.encode(errors="surrogateescape").decode()
  except UnicodeError as error:
    raise UserError(f"the prompt {text!r} is not UTF-8") from error
