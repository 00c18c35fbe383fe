"""The index of a built data set: everything about its rows except pixels.

Three Arrow files, of which a run reads what it needs, so that a set of any size opens at once:

  rows.arrow: a row's labels, and the numbers of its caption and of its images
  captions.arrow: captions by number, each text once
  images.arrow: where to find an image by number, each content once, and its size

Numbers count in the order of first appearance.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jaxpref.errors import UserError, first_line, storage_error
from jaxpref.runtime import progress, records

FILES = ("rows.arrow", "captions.arrow", "images.arrow")
_CHUNK = 1 << 12  # rows that are read at a time
_BATCH = 1 << 16  # rows of a batch of an Arrow file
_IMAGES = pa.schema(
  [("row", pa.int64()), ("column", pa.int32()), ("height", pa.int32()), ("width", pa.int32())]
)
_CAPTIONS = pa.schema([("text", pa.string())])


class Index:
  """An opened index.

  Attributes:
    names: of the rows' columns: `caption`, `image_0`, ..., and the labels that the rows have.
    captions: texts by number.
    images: with `row` and `column`, the number k of its column `jpg_k` or -1 for `jpg`,
      `height` and `width` in pixels.
  """

  def __init__(self, file: Path, captions: Sequence[str], images: pa.Table):
    """Opens the rows in `file`; captions and images are mapped into memory."""
    self._file, self.captions, self.images = file, captions, images
    with pa.OSFile(str(file)) as source:
      self.names: list[str] = pa.ipc.open_file(source).schema.names
    self._length = sum(batch.num_rows for batch in self._batches())

  def __len__(self) -> int:
    """Returns the number of rows."""
    return self._length

  def image_names(self) -> list[str]:
    """Returns the names of the columns with the numbers of a row's images."""
    numbers = (n[6:] for n in self.names if n.startswith("image_") and n[6:].isdecimal())
    return [f"image_{k}" for k in sorted(map(int, numbers))]

  def column(self, name: str) -> np.ndarray:
    """Reads a whole column."""
    # Not mapped into memory, where the whole file would then stay.
    parts = (batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches())
    return np.concatenate(list(parts))

  def gather(self, names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Reads columns of numbers at some rows.

    Args:
      names: M columns of one type.
      rows: their numbers in ascending order, int [N].

    Returns:
      [N, M].
    """
    found: np.ndarray | None = None
    start = done = 0
    for batch in self._batches():
      end = done + int(np.searchsorted(rows[done:], start + batch.num_rows))
      for k, name in enumerate(names):
        values = batch.column(name).to_numpy(zero_copy_only=False)
        if found is None:
          found = np.empty((len(rows), len(names)), values.dtype)
        found[done:end, k] = values[rows[done:end] - start]
      start, done = start + batch.num_rows, end
    return np.empty((0, len(names)), np.int32) if found is None else found

  def _batches(self) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(self._file)) as source:
      reader = pa.ipc.open_file(source)
      for k in range(reader.num_record_batches):
        yield reader.get_batch(k)
    pa.default_memory_pool().release_unused()  # it would keep some ten megabytes


class _Texts(Sequence[str]):
  """Texts of an Arrow column, which are read one by one."""

  def __init__(self, column: pa.ChunkedArray):
    self._column = column

  def __len__(self) -> int:
    return len(self._column)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    return self._column[int(i)].as_py()


def checksums(directory: Path) -> dict[str, str]:
  """Returns the SHA-256 digest of each file of an index; Arrow files have no checksums."""
  found = {}
  for name in FILES:
    with (directory / name).open("rb") as file:
      found[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return found


def read(directory: Path, expected: Mapping[str, str], *, advice: str) -> Index:
  """Opens the index of a built data set.

  Args:
    directory: of the data set.
    expected: from `checksums`, when the index was made.
    advice: what the user should do if a file is damaged.

  Raises:
    UserError: a file is missing or damaged.
  """
  try:
    found = checksums(directory)
  except OSError as error:
    raise UserError(f"{directory} is damaged: {first_line(error)}; {advice}") from error
  if damaged := [name for name in FILES if found[name] != expected.get(name)]:
    raise UserError(f"{directory / damaged[0]} is damaged: its checksum differs; {advice}")
  try:
    captions, images = (
      pa.ipc.open_file(pa.memory_map(str(directory / name))).read_all() for name in FILES[1:]
    )
    return Index(directory / FILES[0], _Texts(captions.column("text")), images)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f"{directory} is damaged: {first_line(error)}; {advice}") from error


def write(directory: Path, columns: Sequence[str], *, advice: str) -> str:
  """Reads all rows of a data set once and writes its index, in constant memory.

  Args:
    directory: of the data set, whose shards and metadata are written.
    columns: of its rows, see `stored_rows.columns_of`.
    advice: what the user should do if a shard is damaged.

  Returns:
    A digest of the rows' captions, images and labels.

  Raises:
    UserError: a file cannot be written, or a shard is damaged.
  """
  table = records.Records(directory, "train", advice=advice)
  # Numbers by content; on disk, since they may not fit in memory.
  journal = directory / ".index.sqlite"
  journal.unlink(missing_ok=True)
  temporary = [directory / f".{name}.tmp" for name in FILES]
  digest = hashlib.sha256()
  database = sqlite3.connect(journal, isolation_level=None)
  try:
    database.execute("pragma journal_mode = off")
    database.execute("pragma synchronous = off")
    schemas = (_schema_of(columns), _CAPTIONS, _IMAGES)
    with (
      progress.progress_bar(total=len(table), unit="row", desc="index") as bar,
      pa.OSFile(str(temporary[0]), "wb") as rows,
      pa.OSFile(str(temporary[1]), "wb") as captions,
      pa.OSFile(str(temporary[2]), "wb") as images,
    ):
      sinks = (rows, captions, images)
      writers = [_Writer(sink, s) for sink, s in zip(sinks, schemas, strict=True)]
      for parts in _chunks(table, columns, database, digest):
        for writer, part in zip(writers, parts, strict=True):
          writer.add(part)
        bar.update(len(parts[0]["caption"]))
      for writer in writers:
        writer.close()
    for path, name in zip(temporary, FILES, strict=True):
      path.replace(directory / name)
  except OSError as error:
    raise storage_error(f"cannot write the index of {directory}: {error}", error) from error
  finally:
    database.close()
    journal.unlink(missing_ok=True)
  return digest.hexdigest()[:16]


class _Writer:
  """A writer of an Arrow file with large batches, from small ones."""

  def __init__(self, sink: Any, schema: pa.Schema):
    self._schema, self._waiting = schema, pa.Table.from_batches([], schema)
    self._file = pa.ipc.new_file(sink, schema)

  def add(self, columns: dict[str, list]) -> None:
    """Adds rows."""
    self._waiting = pa.concat_tables([self._waiting, pa.table(columns, schema=self._schema)])
    if len(self._waiting) >= _BATCH:
      self._write()

  def close(self) -> None:
    """Writes what is left, and the end of the file."""
    self._write()
    self._file.close()

  def _write(self) -> None:
    for batch in self._waiting.combine_chunks().to_batches():
      self._file.write_batch(batch)
    self._waiting = pa.Table.from_batches([], self._schema)


def _schema_of(columns: Sequence[str]) -> pa.Schema:
  fields = [("caption", pa.int32())]
  for name in columns:
    if name.startswith("jpg"):
      fields.append((_image_column(name), pa.int32()))
    elif name.endswith("_uid"):
      fields.append((name, pa.string()))
    elif name not in ("caption", "prompt"):
      fields.append((name, pa.bool_() if name == "liked" else pa.float32()))
  return pa.schema(fields)


def _image_column(name: str) -> str:
  return f"image_{name[4:] or 0}"


def _chunks(
  table: records.Records, columns: Sequence[str], database: sqlite3.Connection, digest: Any
) -> Iterator[tuple[dict[str, list], ...]]:
  """Yields the columns of rows, of their new captions and of their new images."""
  names = _schema_of(columns).names
  caption_numbers, image_numbers = (_Numbers(database, name) for name in ("captions", "images"))
  for start in range(0, len(table), _CHUNK):
    rows: dict[str, list] = {name: [] for name in names}
    captions: dict[str, list] = {"text": []}
    images: dict[str, list] = {name: [] for name in _IMAGES.names}
    database.execute("begin")
    for i in range(start, min(start + _CHUNK, len(table))):
      row = table[i]
      for name in columns:
        value = row[name]
        if name in ("caption", "prompt"):
          number, new = caption_numbers.of(value)
          digest.update(b"t" + value + b"\0")
          rows["caption"].append(number)
          if new:
            captions["text"].append(value.decode())
        elif name.startswith("jpg"):
          content = hashlib.sha256(value).digest()
          digest.update(content)
          number, new = image_numbers.of(content)
          rows[_image_column(name)].append(number)
          if new:
            height, width = row[name.replace("jpg", "size")]
            found = {"row": i, "column": int(name[4:] or -1), "height": height, "width": width}
            for key, of in found.items():
              images[key].append(of)
        else:
          rows[name].append(_plain(value))
          digest.update(repr(rows[name][-1]).encode())
    database.execute("commit")
    yield rows, captions, images


def _plain(value: Any) -> Any:
  return value.decode() if isinstance(value, bytes) else np.asarray(value).item()


class _Numbers:
  """Numbers of contents in the order of their first appearance, kept on disk."""

  def __init__(self, database: sqlite3.Connection, name: str):
    self._database, self._name, self._count = database, name, 0
    database.execute(f"create table {name} (key blob primary key, number int) without rowid")

  def of(self, key: bytes) -> tuple[int, bool]:
    """Returns the number of a content, and whether it is new."""
    query = f"select number from {self._name} where key = ?"
    if found := self._database.execute(query, (key,)).fetchone():
      return found[0], False
    self._database.execute(f"insert into {self._name} values (?, ?)", (key, self._count))
    self._count += 1
    return self._count - 1, True
