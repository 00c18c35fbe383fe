"""Safetensors files of one part of a pipeline, read one tensor at a time.

diffusers and transformers write one file, or shards with an index. Either may have a variant
such as fp16 in its name. Pickled weights are refused, because reading them can run any program
that their author put there.
"""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpref.errors import UserError, listed
from jaxpref.models import config_files

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_OTHER_FORMATS = {".msgpack": "Flax", ".onnx": "ONNX", ".h5": "TensorFlow", ".gguf": "GGUF"}
# Parts of tensor names in LoRA files of several programs.
_LORA = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "_lora.")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor on disk.

  Attributes:
    file: an open safetensors file, which is closed when its last tensor is garbage-collected.
    path: the file's path.
    name: the tensor's name in the file.
    shape: as stored.
    dtype: as stored, in safetensors' names, such as F16.
  """

  file: Any
  path: Path
  name: str
  shape: tuple[int, ...]
  dtype: str

  def read(self) -> np.ndarray:
    """Reads the tensor, in its stored dtype.

    Raises:
      UserError: the file is damaged.
    """
    try:
      return self.file.get_tensor(self.name)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
      raise UserError(f"{self.path}: {self.name} cannot be read: {error}") from error


def choose(files: Collection[str], stem: str, variant: str) -> tuple[str, list[str]] | None:
  """Chooses a part's weight files.

  Args:
    files: names of all files beside the part's configuration.
    stem: the name of the part's weight files, without suffixes.
    variant: such as 'fp16', with plain files as the second choice; '' chooses the plain files,
      with fp16's as the second choice.

  Returns:
    The variant ('' for plain files), and one file, or an index and its shards; or None.
  """
  for kind in (variant, "") if variant else ("", "fp16"):
    dot = f".{kind}" if kind else ""
    if (single := f"{stem}{dot}.safetensors") in files:
      return kind, [single]
    if (index := f"{stem}.safetensors.index{dot}.json") in files:
      number, dot = r"-\d+-of-\d+", re.escape(dot)
      # Until diffusers 0.29 the variant came after the number.
      shard = re.compile(rf"{re.escape(stem)}(?:{dot}{number}|{number}{dot})\.safetensors")
      return kind, [index, *sorted(file for file in files if shard.fullmatch(file))]
  return None


def no_weights_error(files: Collection[str], stem: str, variant: str, where: str) -> UserError:
  """Makes the error for a part without readable weights; says what there is instead.

  Args:
    files: names of all files beside the part's configuration.
    stem: the name of the part's weight files, without suffixes.
    variant: the requested variant.
    where: the part's directory.
  """
  known = {m[1] for f in files if (m := re.fullmatch(rf"{stem}\.(\w+)\.safetensors", f))}
  if known:
    return UserError(
      f"{where} has only the variants {', '.join(sorted(known))}: choose one as the variant"
    )
  for file in sorted(files):
    if Path(file).suffix in PICKLES:
      return pickle_error(Path(where) / file)
  for file in sorted(files):
    if kind := _OTHER_FORMATS.get(Path(file).suffix):
      return UserError(
        f"{where} has only {kind} weights ({file}), which are not supported: name a repository "
        "or directory with safetensors"
      )
  dot = f".{variant}" if variant else ""
  return UserError(f"{where}/{stem}{dot}.safetensors is missing")


def files_in(directory: Path) -> list[str]:
  """Lists the names in a directory; [] if it does not exist."""
  return [p.name for p in directory.iterdir()] if directory.is_dir() else []


def open_part(directory: Path, stem: str, *, variant: str = "") -> dict[str, StoredTensor]:
  """Opens the tensors of one part of a pipeline, by name, without reading them.

  Args:
    directory: such as `PIPELINE/vae`.
    stem: the name of the part's weight files, without suffixes.
    variant: see `choose`.

  Raises:
    UserError: weights are missing, pickled or damaged, a file lacks tensors that are in the
      index, or the index names a file elsewhere.
  """
  files = files_in(directory)
  found = choose(files, stem, variant)
  if found is None:
    raise no_weights_error(files, stem, variant, str(directory))
  first = directory / found[1][0]
  return _open_shards(first) if first.suffix == ".json" else open_file(first)


def pickle_error(path: Path) -> UserError:
  """Makes the error for pickled weights; says how to convert them."""
  return UserError(
    f"{path} is pickled, and reading it may run any program in it. If you trust the file, "
    "convert it once where PyTorch is installed, by loading it with diffusers or transformers "
    "and calling save_pretrained(DIR, safe_serialization=True)"
  )


def open_file(path: Path) -> dict[str, StoredTensor]:
  """Opens the tensors of one file.

  Raises:
    UserError: it is missing, damaged or truncated, or holds a low-rank adapter.
  """
  if path.is_dir():
    raise UserError(f"{path} is a directory, not a file of weights")
  if path.exists() and not path.is_file():
    raise UserError(f"{path} is not a regular file")
  try:
    if path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
      raise UserError(f"{path} is only a git-lfs pointer to the weights: run `git lfs pull`")
    file = safe_open(path, framework="numpy")
    slices = {name: file.get_slice(name) for name in list(file.keys())}
  except FileNotFoundError as error:
    raise UserError(f"{path} is missing") from error
  except (OSError, SafetensorError) as error:
    raise UserError(f"{path} is damaged or truncated: {error}") from error
  if any(mark in name for name in slices for mark in _LORA):
    raise UserError(
      f"{path} holds a low-rank adapter (LoRA), not a model: name the pipeline that it was "
      "trained on; to tune the two together, first fuse the adapter into it with diffusers"
    )
  return {
    name: StoredTensor(file, path, name, tuple(s.get_shape()), s.get_dtype())
    for name, s in slices.items()
  }


def _open_shards(index: Path) -> dict[str, StoredTensor]:
  try:
    places = config_files.read_json(index)["weight_map"]
    files = sorted(set(places.values()))
  except (UserError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} is not an index of weight files: {error!r}") from error
  shards = {}
  for name in files:
    # A name with a directory could point at any file of this machine.
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
      raise UserError(f"{index} names {name!r}, which is not a file beside it")
    if Path(name).suffix in PICKLES:
      raise pickle_error(index.with_name(name))
    shards[name] = open_file(index.with_name(name))
  tensors = {tensor: shards[file].get(tensor) for tensor, file in places.items()}
  if lacking := [f"{t} (in {places[t]})" for t, stored in tensors.items() if stored is None]:
    raise UserError(f"{index} lists tensors that its files lack: {listed(lacking)}")
  return {name: stored for name, stored in tensors.items() if stored is not None}


def file_error(path: Path) -> UserError:
  """Makes the error for a file instead of a pipeline's directory; says what to do."""
  if path.suffix in PICKLES:
    return pickle_error(path)
  if path.suffix == ".json":
    return UserError(f"{path} is a file, not a pipeline's directory: name {path.parent}")
  if path.suffix != ".safetensors":
    return UserError(f"{path} is a file, not a pipeline's directory")
  open_file(path)  # raises a better error for a damaged file or an adapter
  return UserError(
    f"{path} is a single file: convert it once, where PyTorch is installed, to diffusers' "
    "directory layout: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIR)"
  )
