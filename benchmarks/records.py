"""The records of a campaign as one parquet file, a row for each file.

A campaign works on a directory of small files in its `--runs`. The parquet file beside the
campaign's tables is committed, and a campaign that goes on elsewhere starts from it.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxpref.runtime import workdir


def pack(directory: Path, file: Path) -> None:
  """Writes every file below `directory` into a parquet file of names and contents."""
  files = sorted(path for path in directory.rglob("*") if path.is_file())
  table = pa.table(
    {
      "name": [path.relative_to(directory).as_posix() for path in files],
      "contents": pa.array([path.read_bytes() for path in files], pa.binary()),
    }
  )
  buffer = pa.BufferOutputStream()
  pq.write_table(table, buffer, compression="zstd")
  workdir.write_bytes(file, buffer.getvalue().to_pybytes())


def unpack(file: Path, directory: Path) -> None:
  """Restores the files of `pack` that `directory` does not have."""
  if not file.exists():
    return
  for row in pq.read_table(file).to_pylist():
    path = directory / row["name"]
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(row["contents"])
