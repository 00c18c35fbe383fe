"""Pairs that models have drawn, as an ArrayRecord data set that tensorflow_datasets reads.

It is written a shard at a time, each whole or not at all, so that what was drawn before an
interruption is not drawn again; `complete.json` comes last. Columns are those of Pick-a-Pic v2
and how the pair was made. Image 0 is the winner, image 1 the loser.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jaxpref.errors import UserError, storage_error
from jaxpref.paths import user_path
from jaxpref.runtime import records, workdir

_NAME, _SPLIT = "online_pairs", "train"
_ADVICE = "delete the directory, and the run that has drawn these pairs draws them anew"
_COMPLETE = "complete.json"  # the sizes of all files, and what is in them


def _features() -> tfds.features.FeaturesDict:
  text, bytes_ = tfds.features.Text, tfds.features.Tensor
  columns: dict[str, Any] = {
    "caption": text(),
    "has_label": np.bool_,
    "ranking_id": np.int64,
    "change": np.float32,  # root mean square between the two images' latents
    "guidance": np.float32,  # with which the loser was drawn
    "text_guidance": np.float32,  # of the improver; 0 where the winner is from the data
    "image_guidance": np.float32,
    "num_steps": np.int64,  # of the solver, with which the loser was drawn
    "improve_steps": np.int64,  # and the winner; 0 of the data
  }
  for k in (0, 1):
    columns |= {
      f"image_{k}_uid": text(),
      f"jpg_{k}": bytes_(shape=(), dtype=np.object_),  # a PNG: no loss
      f"label_{k}": np.float32,
      f"model_{k}": text(),  # the digest of its weights, or 'data'
      f"seed_{k}": np.int64,  # of its noise; -1 for the data's
    }
  return tfds.features.FeaturesDict(columns)


def shards_of(rows: int, size: int) -> list[range]:
  """The rows of each shard."""
  return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def missing(directory: Path, shards: int) -> list[int]:
  """Shards that are not there yet, of a directory that is made if need be.

  What a killed process has left of them is removed.
  """
  directory.mkdir(parents=True, exist_ok=True)
  for rest in directory.glob(f".{_NAME}-*.tmp"):
    rest.unlink()
  return [i for i in range(shards) if not _path(directory, i, shards).exists()]


def write_shard(
  directory: Path, shard: int, shards: int, rows: Iterable[Mapping[str, Any]]
) -> None:
  """Writes a shard, whole or not at all.

  Args:
    directory: of the data set.
    shard: its number.
    shards: how many there will be.
    rows: with all the columns.

  Raises:
    UserError: it cannot be written.
  """
  features = _features()
  serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
  path = _path(directory, shard, shards)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    directory.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for row in rows:
      writer.write(serializer.serialize_example(features.encode_example(dict(row))))
    writer.close()
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise storage_error(f"cannot write {path}: {error}", error) from error
  except RuntimeError as error:  # ArrayRecord's
    temporary.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {error}") from error


def finish(directory: Path, lengths: Sequence[int], *, description: str) -> None:
  """Makes a data set of a directory of shards.

  Args:
    directory: with all shards.
    lengths: rows of each.
    description: what it holds.
  """
  template = tfds.core.ShardedFileTemplate(
    data_dir=directory, dataset_name=_NAME, split=_SPLIT, filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name=_SPLIT,
    shard_lengths=list(lengths),
    num_bytes=sum(p.stat().st_size for p in directory.glob(f"{_NAME}-*")),
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=directory,
    features=_features(),
    split_infos=[split],
    filename_template=template,
    description=description,
    check_data=False,  # it would take TensorFlow
  )
  source = records.Records(directory, _SPLIT, advice=_ADVICE)
  # One at a time: they may be more than memory holds.
  changes = [float(source[i]["change"]) for i in range(len(source))]
  workdir.write_json(directory / _COMPLETE, {"changes": changes, "sizes": _sizes(directory)})


def is_finished(directory: Path) -> bool:
  """Whether the data set is whole; a damaged record of it is set aside, to be made again."""
  return workdir.read_or_set_aside(directory / _COMPLETE, _is_record) is not None


def _is_record(value: Any) -> bool:
  if not isinstance(value, dict) or value.keys() != {"changes", "sizes"}:
    return False
  changed, sizes = value["changes"], value["sizes"]
  return (
    isinstance(changed, list)
    and all(isinstance(x, int | float) for x in changed)
    and isinstance(sizes, dict)
  )


def changes(directory: Path) -> np.ndarray:
  """Of each pair of a finished data set, the distance between its images' latents.

  Raises:
    UserError: there is none in the directory, or files of it are missing or cut short.
  """
  if not (directory / _COMPLETE).exists():
    raise UserError(
      f"there are no generated pairs in {directory}: no {_COMPLETE}; those of an iteration "
      "are in pairs/1, pairs/2, ... of its run"
    )
  found = workdir.read_json(directory / _COMPLETE, _is_record)
  changed, expected = np.array(found["changes"], float), found["sizes"]
  there = _sizes(directory)
  if damaged := [name for name, size in expected.items() if there.get(name) != size]:
    raise UserError(f"the pairs in {directory} are damaged: {', '.join(damaged)}")
  return changed


def count_kept(changes: np.ndarray, data: Any) -> int:
  """How many of pairs with these `changes` are trained on, by the configuration's section."""
  count = int(np.sum(changes >= data.min_change))
  return min(count, data.num_rows or count)


def open_pairs(directory: str | os.PathLike) -> Sequence[Mapping[str, Any]]:
  """The rows of a finished data set: `len`, `[i]`, columns to values, text as bytes.

  Raises:
    UserError: as `changes`.
  """
  path = user_path(directory)
  changes(path)
  return records.Records(path, _SPLIT, advice=_ADVICE)


def _sizes(directory: Path) -> dict[str, int]:
  files = (*directory.glob(f"{_NAME}-*"), *directory.glob("*_info.json"))
  files = (*files, directory / "features.json")
  return {p.name: p.stat().st_size for p in sorted(files) if p.exists()}


def _path(directory: Path, shard: int, shards: int) -> Path:
  return directory / f"{_NAME}-{_SPLIT}.array_record-{shard:05d}-of-{shards:05d}"
