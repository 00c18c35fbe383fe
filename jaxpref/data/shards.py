"""ArrayRecord shards of a data set that tensorflow_datasets describes and opens.

Each shard is written atomically, so that an interrupted job does not write finished shards
again. No part of it needs TensorFlow.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jaxpref.errors import UserError, storage_error


class Layout(NamedTuple):
  """Where a data set's shards are, and what is in them.

  Attributes:
    directory: of the data set.
    name: of the data set.
    features: of a row.
    split: of the rows.
  """

  directory: Path
  name: str
  features: tfds.features.FeaturesDict
  split: str = "train"


def path_of(layout: Layout, shard: int, shards: int) -> Path:
  """Returns the path of a shard, as tensorflow_datasets names it."""
  file = f"{layout.name}-{layout.split}.array_record-{shard:05d}-of-{shards:05d}"
  return layout.directory / file


def ranges(rows: int, size: int) -> list[range]:
  """Returns the row numbers of each shard; `size` is the number of rows per shard."""
  return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def remove_temporary(layout: Layout) -> None:
  """Removes the temporary files of killed processes."""
  for rest in layout.directory.glob(f".{layout.name}-*.tmp"):
    rest.unlink()


def missing(layout: Layout, shards: int) -> list[int]:
  """Returns the numbers of the shards that are not written yet.

  Creates the directory and removes the temporary files of killed processes.
  """
  layout.directory.mkdir(parents=True, exist_ok=True)
  remove_temporary(layout)
  return [i for i in range(shards) if not path_of(layout, i, shards).exists()]


def write_shard(
  layout: Layout, shard: int, shards: int, rows: Iterable[Mapping[str, Any]]
) -> None:
  """Writes a shard atomically.

  Args:
    layout: of the data set.
    shard: number of the shard.
    shards: total number of shards.
    rows: rows with all columns.

  Raises:
    UserError: the shard cannot be written.
  """
  features = layout.features
  serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
  path = path_of(layout, shard, shards)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    layout.directory.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for row in rows:
      example = serializer.get_tf_example(features.encode_example(dict(row)))
      # Otherwise the order of the columns, and so the bytes, would differ between processes.
      writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise storage_error(f"cannot write {path}: {error}", error) from error
  except RuntimeError as error:  # raised by ArrayRecord
    temporary.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {error}") from error


def write_info(layout: Layout, lengths: Sequence[int], *, description: str) -> None:
  """Writes the metadata that makes a directory of shards a data set.

  Args:
    layout: of the data set, all of whose shards are written.
    lengths: number of rows of each shard.
    description: of the data set.
  """
  template = tfds.core.ShardedFileTemplate(
    data_dir=layout.directory,
    dataset_name=layout.name,
    split=layout.split,
    filetype_suffix="array_record",
  )
  split = tfds.core.SplitInfo(
    name=layout.split,
    shard_lengths=list(lengths),
    num_bytes=sum(p.stat().st_size for p in layout.directory.glob(f"{layout.name}-*")),
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=layout.directory,
    features=layout.features,
    split_infos=[split],
    filename_template=template,
    description=description,
    check_data=False,  # the check needs TensorFlow
  )


def sizes(layout: Layout) -> dict[str, int]:
  """Returns the sizes in bytes of the data set's files by name."""
  files = (
    *layout.directory.glob(f"{layout.name}-*"),
    *layout.directory.glob("*_info.json"),
    layout.directory / "features.json",
  )
  return {p.name: p.stat().st_size for p in sorted(files) if p.exists()}
