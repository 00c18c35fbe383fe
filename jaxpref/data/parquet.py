"""A reader of parquet files that checks column types and reads one row group at a time.

Text columns are read as bytes, so that a caption that is not UTF-8 affects only its own row.
Images are bytes or, as the package `datasets` writes them, a struct of bytes and a path.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxpref.errors import UserError, first_line

_MEANING = {
  "text": "text",
  "number": "a number",
  "name": "text or an integer",
  "image": "an image's bytes, or a struct of bytes and path",
}


def open_file(file: Path, kinds: Mapping[str, str]) -> pq.ParquetFile:
  """Opens a file and checks the types of its columns.

  Args:
    file: the file; if its pages have checksums, they are verified.
    kinds: column name -> 'text', 'number', 'name' or 'image'; columns may be missing.

  Raises:
    UserError: it is not a parquet file, or a column has another type.
  """
  try:
    opened = pq.ParquetFile(file, page_checksum_verification=True)
    schema = opened.schema_arrow
    columns = {name: schema.field(name).type for name in kinds if name in schema.names}
  except Exception as error:  # for damaged files pyarrow raises errors of any type
    raise UserError(f"{file} cannot be read as parquet: {first_line(error)}") from error
  for name, found in columns.items():
    if not _fits(kinds[name], found):
      raise UserError(
        f"{file}: column {name} must be {_MEANING[kinds[name]]} (got {str(found)[:100]})"
      )
  return opened


def read_group(opened: pq.ParquetFile, file: Path, group: int, columns: Iterable[str]) -> Any:
  """Reads a row group.

  Args:
    opened: from `open_file`.
    file: its path, for error messages.
    group: number of the row group.
    columns: names of the columns to read.

  Returns:
    Column name -> list of values.

  Raises:
    UserError: the file is damaged.
  """
  try:
    table = opened.read_row_group(group, columns=list(columns))
    return {name: _values(table.column(name)) for name in table.column_names}
  except Exception as error:  # for damaged files pyarrow raises errors of any type
    raise UserError(f"{file} is damaged: {first_line(error)}") from error


def _fits(kind: str, found: pa.DataType) -> bool:
  if pa.types.is_dictionary(found):
    found = found.value_type
  match kind:
    case "text":
      return _is_text(found) or _is_bytes(found)
    case "name":
      return _is_text(found) or _is_bytes(found) or pa.types.is_integer(found)
    case "number":
      tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
      return any(test(found) for test in (*tests, pa.types.is_decimal))
    case _:
      if not pa.types.is_struct(found):
        return _is_bytes(found)
      parts = {field.name: field.type for field in found}
      return _is_bytes(parts.get("bytes", pa.null())) and (
        "path" not in parts or _is_text(parts["path"]) or pa.types.is_null(parts["path"])
      )


def _is_text(found: pa.DataType) -> bool:
  tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
  return any(test(found) for test in tests)


def _is_bytes(found: pa.DataType) -> bool:
  tests = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    pa.types.is_fixed_size_binary,
  )
  return any(test(found) for test in tests)


def _values(column: pa.ChunkedArray) -> list[Any]:
  """Returns the values of a column: text as bytes, a struct as (bytes, path)."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if pa.types.is_struct(column.type):
    names = [field.name for field in column.type]
    content = _values(pc.struct_field(column, "bytes"))
    no_path = [None] * len(column)
    paths = _values(pc.struct_field(column, "path")) if "path" in names else no_path
    return list(zip(content, paths, strict=True))
  if _is_text(column.type):  # not checked for UTF-8
    column = column.cast(pa.large_binary())
  return column.to_pylist()
