"""Data sets of the shapes world: drawn on first use, written once, whole or not at all.

A data set is a tensorflow_datasets builder without TensorFlow: rows are written as
ArrayRecord into the user's TFDS directory, and read back from then on.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxpref.data import records
from jaxpref.errors import DamagedError, UserError
from jaxpref.paths import user_path
from jaxpref.runtime import workdir
from jaxpref.shapes import annotator, flaws, palette, prompts, render

SPLITS = ("train", "test")
_MARKER = "complete.json"  # written last: without it, a directory is built anew


class ShapesBuilder(tfds.core.GeneratorBasedBuilder):
  """What the shapes world's builders share; marks its directory once that is whole.

  Their configurations have `num_train` and `num_test`, rows of either split.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. To look for checksums, tensorflow_datasets would import
  # importlib_resources, which it does not require.
  url_infos = None

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    del dl_manager  # there is nothing to download
    config = self.builder_config
    return {
      "train": self._generate_examples("train", config.num_train),
      "test": self._generate_examples("test", config.num_test),
    }

  def _post_download_and_prepare_hook(self) -> None:
    """Marks the directory as complete, with what it takes to check that."""
    directory = Path(self.data_dir)
    sizes = {p.name: p.stat().st_size for p in sorted(directory.iterdir())}
    temporary = directory / f"{_MARKER}.tmp"
    temporary.write_text(
      json.dumps({"code": _fingerprint(type(self)), "sizes": sizes}), encoding="utf-8"
    )
    temporary.replace(directory / _MARKER)


def load(
  kind: type[ShapesBuilder],
  config: tfds.core.BuilderConfig,
  split: str,
  *,
  data_dir: str | os.PathLike | None,
) -> records.Records:
  """The rows of a split; drawn and written first if they are not there yet.

  Safe to call from several processes at once: one writes, the others wait.

  Args:
    kind: the data set.
    config: which of it.
    split: 'train' or 'test', the split of the prompts.
    data_dir: the TFDS directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets,
      or a temporary one for users without a home.

  Returns:
    A random-access source of rows (`len`, `[i]`), columns to values, text as bytes.

  Raises:
    UserError: the directory cannot be written, is damaged or not on this machine.
    ValueError: there is no such split.
  """
  if split not in SPLITS:
    raise ValueError(f"split is one of {SPLITS}, not {split!r}")
  root = _data_dir(data_dir)
  directory = root / kind.name / config.name / str(kind.VERSION)
  if not _is_complete(directory, kind):
    try:
      _build(kind, directory, root, config)
    except OSError as error:
      raise UserError(f"cannot write the shapes world's data: {error}") from error
  advice = f"delete {directory}, and its rows are drawn anew"
  return records.Records(directory, split, advice=advice)


def rng_of(seed: int, stream: int, split: str, i: int) -> np.random.Generator:
  """All that is random in row `i`; `stream` keeps data sets apart."""
  return np.random.default_rng([seed, stream, SPLITS.index(split), i])


def png(image: np.ndarray) -> bytes:
  """The image as a file, without loss."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG", compress_level=3)
  return file.getvalue()


def _data_dir(data_dir: str | os.PathLike | None) -> Path:
  place = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or _default_data_dir())
  if "://" in place:
    raise UserError(
      f"the shapes world's data need a local TFDS directory, not {place}: "
      "set TFDS_DATA_DIR to one"
    )
  try:
    return user_path(place)
  except UserError as error:
    raise UserError(f"{error}: set TFDS_DATA_DIR to where data sets may be stored") from error


def _default_data_dir() -> Path:
  """TFDS's own default; for users without a home that they may write, a temporary directory."""
  default = Path("~/tensorflow_datasets")
  try:
    default = default.expanduser()
  except RuntimeError:  # no HOME, and a user without an entry
    default = Path()
  above = next((p for p in (default, *default.parents) if p.exists()), default)
  if default.is_absolute() and os.access(above, os.W_OK | os.X_OK):
    return default
  return Path(tempfile.gettempdir()) / f"tensorflow_datasets-{os.getuid()}"


def _build(
  kind: type[ShapesBuilder], directory: Path, root: Path, config: tfds.core.BuilderConfig
) -> None:
  directory.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(directory.parent / ".lock"):
    if _is_complete(directory, kind):
      return
    if directory.exists():  # moved by one rename, so that no half of it can stay
      directory.rename(directory.with_name(f"incomplete.{uuid.uuid4().hex}"))
    for rest in directory.parent.glob("incomplete.*"):  # as tfds names them, too
      shutil.rmtree(rest)
    builder = kind(config=config, data_dir=root, file_format="array_record")
    tfds.disable_progress_bar()  # its bars know no total; ours do
    try:
      # It says on stdout that it downloads.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    finally:
      tfds.enable_progress_bar()


def _is_record(value: Any) -> bool:
  return isinstance(value, dict) and isinstance(value.get("sizes"), dict)


def _is_complete(directory: Path, kind: type[ShapesBuilder]) -> bool:
  """Whether all files are there, whole, and drawn by the code as it is now."""
  try:
    record = workdir.read_json(directory / _MARKER, _is_record)
    sizes = {name: (directory / name).stat().st_size for name in record["sizes"]}
  except (OSError, ValueError, DamagedError):
    return False
  return record == {"code": _fingerprint(kind), "sizes": sizes}


def _fingerprint(kind: type[ShapesBuilder]) -> str:
  drawing: Sequence[ModuleType] = (annotator, flaws, palette, prompts, render)
  here = (sys.modules[__name__], sys.modules[kind.__module__])
  source = "".join(inspect.getsource(module) for module in (*drawing, *here))
  return hashlib.sha256(source.encode()).hexdigest()[:16]
