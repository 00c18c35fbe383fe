"""The images of a data set with their prompts, read one batch at a time."""

import concurrent.futures
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxpref.data import bad_rows, build, image_scores, images, sources, stored_rows
from jaxpref.data.bad_rows import BadRow, Tally
from jaxpref.data.sources import built
from jaxpref.errors import UserError

T = TypeVar("T")
J = TypeVar("J")


class Item(NamedTuple):
  """An image to score.

  Attributes:
    row: number of its row in the data set.
    arm: number of the image in its row.
    digest: SHA-256 digest of its file, or '' if it cannot be read.
    prompt: of the row, or '' if it cannot be read.
    image: uint8 [H, W, 3], or None if it cannot be used.
    failure: the reason, or ''.
  """

  row: int
  arm: int
  digest: str
  prompt: str
  image: np.ndarray | None
  failure: str


class ImageReader:
  """The images of a data set in a fixed order.

  Attributes:
    digest: of a built data set, its own; of another source, of its rows' names.
  """

  def __init__(
    self,
    table: sources.Table,
    columns: Sequence[str],
    digest: str,
    places: tuple[np.ndarray, np.ndarray],
  ):
    """Opens the images.

    Args:
      table: rows.
      columns: of the rows.
      digest: see above.
      places: row and arm of each image.
    """
    self.digest = digest
    self._table, (self._row, self._arm) = table, places
    self._files = [name for name in columns if name.startswith("jpg")]
    self._text = "prompt" if "prompt" in columns else "caption"

  def __len__(self) -> int:
    """Returns the number of images."""
    return len(self._row)

  def read(self, numbers: Sequence[int], decoders: concurrent.futures.Executor) -> list[Item]:
    """Reads images by number.

    Raises:
      UserError: a file of the data set is damaged.
    """
    rows: dict[int, Mapping[str, Any] | BadRow] = {}
    for number in numbers:
      if (row := int(self._row[number])) not in rows:
        rows[row] = self._row_or_reason(row)
    return list(decoders.map(lambda n: self._decode(n, rows[int(self._row[n])]), numbers))

  def _row_or_reason(self, row: int) -> Mapping[str, Any] | BadRow:
    try:
      return self._table[row]
    except BadRow as error:
      return error

  def _decode(self, number: int, values: Mapping[str, Any] | BadRow) -> Item:
    row, arm = int(self._row[number]), int(self._arm[number])
    digest = prompt = ""
    try:
      if isinstance(values, BadRow):
        raise values
      prompt = bad_rows.caption_of(values[self._text], self._text)
      column = self._files[arm]
      content = stored_rows.bytes_of(values[column], column)
      digest = hashlib.sha256(content).hexdigest()
      return Item(row, arm, digest, prompt, images.decode(content), "")
    except BadRow as error:
      return Item(row, arm, digest, prompt, None, error.reason)


def open_built(path: str) -> ImageReader:
  """Opens the different images and captions of a built data set.

  Raises:
    UserError: it is damaged, or has no images.
  """
  opened, table = built.open_set(path), built.read_facts(path)["plan"]["table"]
  if not opened.row_index.image_names():
    raise UserError(f"{path} is a data set of captions, which has no images to score")
  columns = stored_rows.columns_of(table, opened[0])
  places = image_scores.places_of(opened.row_index)
  return ImageReader(opened, columns, opened.digest, (places.row, places.arm))


def open_source(plan: build.Plan, tally: Tally) -> ImageReader:
  """Opens all images of a source's table.

  Args:
    plan: with the source, its path and the table.
    tally: counts the files that are not in the table.

  Raises:
    UserError: the source cannot be opened, or has no images.
  """
  table, columns = build.open_table(plan, tally)
  arms = sum(name.startswith("jpg") for name in columns)
  if not arms:
    raise UserError(f"{plan.path} has only captions, not images to score")
  where = bad_rows.named_by(table)
  digest = hashlib.sha256(repr((plan.source, plan.table, plan.split, arms)).encode())
  for i in range(len(table)):
    digest.update(where(i).encode(errors="surrogateescape") + b"\0")
  places = np.divmod(np.arange(len(table) * arms), arms)
  return ImageReader(table, columns, digest.hexdigest()[:16], places)


def ahead(read: Callable[[J], T], jobs: Iterable[J]) -> Iterator[T]:
  """Yields the result of each job in order, while a thread works on the next one."""
  with concurrent.futures.ThreadPoolExecutor(1) as reader:
    waiting: concurrent.futures.Future[T] | None = None
    for job in jobs:
      following = reader.submit(read, job)
      if waiting is not None:
        yield waiting.result()
      waiting = following
    if waiting is not None:
      yield waiting.result()
