"""Files with the scores of a data set's images: one parquet file for each scorer.

A row is the score of one image for its prompt: `row` and `arm` are its place in the data set,
`image` is the SHA-256 digest of its file, and a score that does not exist is null, with the
reason in `failure`. The rows of a built data set are its different images and captions, each
once. The schema's metadata says of which data set they are, so that scores of another one are
refused.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpref.data.row_index import Index
from jaxpref.errors import UserError, first_line, listed
from jaxpref.runtime.paths import user_path

FOLDER = "scores"  # in a built data set
ADVICE = "delete it, and score again"
_ABOUT = b"jaxpref"
_SCHEMA = pa.schema(
  [
    *(("row", pa.int64()), ("arm", pa.int32())),
    *((name, pa.string()) for name in ("image", "prompt", "scorer", "version")),
    *(("score", pa.float64()), ("failure", pa.string())),
  ]
)


class Facts(NamedTuple):
  """The contents of a file of scores.

  Attributes:
    scorer: its name.
    version: of the scorer.
    digest: of the data set.
    images: number of rows.
  """

  scorer: str
  version: str
  digest: str
  images: int

  def key(self) -> str:
    """Returns the name of the scores, '<scorer>-<version>'.

    Raises:
      UserError: no file can have this name.
    """
    key = f"{self.scorer}-{self.version}"
    if not re.fullmatch(r"[\w.+-]+", key):
      raise UserError(f"the version of {self.scorer} must be letters, digits and .+-_: {key!r}")
    return key


class Places(NamedTuple):
  """Images of a data set: the row and arm of each, int [N], and their numbers in the index."""

  row: np.ndarray
  arm: np.ndarray
  image: np.ndarray
  caption: np.ndarray


def places_of(index: Index) -> Places:
  """Returns each image and caption of a built data set once, where they first appear."""
  names = index.image_names()
  found = index.gather([*names, "caption"], np.arange(len(index)))
  image, caption = found[:, :-1].ravel(), np.repeat(found[:, -1], len(names))
  both = image.astype(np.int64) * len(index.captions) + caption
  place = np.sort(np.unique(both, return_index=True)[1])
  row, arm = np.divmod(place, max(len(names), 1))
  return Places(row, arm.astype(np.int32), image[place], caption[place])


def file_of(out: Path, facts: Facts) -> Path:
  """Returns the path of the file of a scorer."""
  return out / f"{facts.key()}.parquet"


def find(directory: Path, name: str) -> Path:
  """Finds a file of scores.

  Args:
    directory: of the built data set.
    name: '<scorer>', '<scorer>-<version>', or the path of a file.

  Raises:
    UserError: it is not there, or there are several versions of the scorer.
  """
  folder = directory / FOLDER
  if name.endswith(".parquet"):
    if not (file := user_path(name)).is_file():
      raise UserError(f"data.score: {name} is not a file")
    return file
  if (file := folder / f"{name}.parquet").is_file():
    return file
  there = sorted(path.stem for path in folder.glob("*.parquet"))
  versions = [key for key in there if key.startswith(f"{name}-")]
  if len(versions) == 1:
    return folder / f"{versions[0]}.parquet"
  if versions:
    raise UserError(f"data.score={name} has several versions: {', '.join(versions)}; name one")
  raise UserError(
    f"{directory} has no scores of {name!r} (there are: {listed(there) or 'none'}); make them "
    f"with: python -m jaxpref.score --path={directory} --scorers={name.partition('-')[0]}"
  )


def read(file: Path, *, digest: str, images: int) -> np.ndarray:
  """Reads the scores of a data set, float64 [images]; NaN for an image without one.

  Args:
    file: of scores.
    digest: of the data set.
    images: number of rows that the file must have.

  Raises:
    UserError: the file is damaged, or of another data set.
  """
  facts = read_facts(file)
  check(file, facts._replace(digest=digest, images=images))
  try:
    column = pq.read_table(file, columns=["score"]).column("score")
    found = column.to_numpy(zero_copy_only=False).astype(np.float64)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"{file} is damaged: {first_line(error)}; {ADVICE}") from error
  if len(found) != images:
    raise UserError(f"{file} is damaged: it has {len(found)} rows, not {images}; {ADVICE}")
  return found


def read_failures(file: Path) -> dict[str, int]:
  """Counts the images without a score of a file by reason."""
  counts = pq.read_table(file, columns=["failure"]).column("failure").value_counts().to_pylist()
  return {entry["values"]: entry["counts"] for entry in counts if entry["values"]}


def read_facts(file: Path) -> Facts:
  """Reads which scores a file holds.

  Raises:
    UserError: the file is damaged, or not a file of scores.
  """
  try:
    schema = pq.read_schema(file)
    about: Any = json.loads((schema.metadata or {})[_ABOUT])
    facts = Facts(**about)
    if schema.remove_metadata() != _SCHEMA or not isinstance(facts.images, int):
      raise ValueError("other columns")
  except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
    raise UserError(
      f"{file} is damaged, or not a file of `python -m jaxpref.score`: {first_line(error)}"
    ) from error
  return facts


def check(file: Path, facts: Facts) -> None:
  """Refuses a file of another data set or scorer.

  Raises:
    UserError: the file is of another data set or scorer, or damaged.
  """
  if (found := read_facts(file)) == facts:
    return
  if found.key() != facts.key():
    raise UserError(f"{file} holds scores of {found.key()}, not of {facts.key()}; {ADVICE}")
  raise UserError(
    f"{file} holds scores of another data set ({found.images} images, digest {found.digest}; "
    f"here {facts.images}, {facts.digest}); {ADVICE}"
  )


def schema_of(facts: Facts) -> pa.Schema:
  """Returns the schema of a file, whose metadata are its facts."""
  return _SCHEMA.with_metadata({_ABOUT: json.dumps(facts._asdict()).encode()})
