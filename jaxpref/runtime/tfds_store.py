"""Generated data sets, stored in the user's TFDS directory on first use.

A data set is a tensorflow_datasets builder that runs without TensorFlow. The first process
that loads it generates the rows and writes them as ArrayRecord; later loads read the files.
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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import filelock
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxpref.errors import DamagedError, UserError
from jaxpref.runtime import records, workdir
from jaxpref.runtime.paths import user_path

SPLITS = ("train", "test")
_MARKER = "complete.json"  # written last; a data set without it is generated again


class StoredBuilder(tfds.core.GeneratorBasedBuilder):
  """Base class of stored data sets; marks a directory as complete when all files are written.

  The builder's configurations have `num_train` and `num_test`, the rows of each split.

  Attributes:
    SOURCES: modules that determine the rows, besides this module and the builder's own. When
      the source code of any of them changes, the data set is generated again.
  """

  SOURCES: ClassVar[tuple[ModuleType, ...]] = ()

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
    """Writes the marker, which has the sizes of all files and the fingerprint of the code."""
    directory = Path(self.data_dir)
    sizes = {p.name: p.stat().st_size for p in sorted(directory.iterdir())}
    temporary = directory / f"{_MARKER}.tmp"
    temporary.write_text(
      json.dumps({"code": _fingerprint(type(self)), "sizes": sizes}), encoding="utf-8"
    )
    temporary.replace(directory / _MARKER)


def load(
  kind: type[StoredBuilder],
  config: tfds.core.BuilderConfig,
  split: str,
  *,
  data_dir: str | os.PathLike | None,
) -> records.Records:
  """Opens a split, and first generates the data set if it is not stored yet.

  Several processes may call it at once: one writes, the others wait.

  Args:
    kind: the data set's builder.
    config: the builder's configuration.
    split: 'train' or 'test', the split of the prompts.
    data_dir: the TFDS directory; by default $TFDS_DATA_DIR or ~/tensorflow_datasets, or a
      temporary directory for users without a home directory.

  Returns:
    A random-access sequence of rows, each a mapping from columns to values; text is bytes.

  Raises:
    UserError: the directory is not writable, is damaged, or is not a local path.
    ValueError: `split` is unknown.
  """
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS} (got {split!r})")
  root = _data_dir(data_dir)
  directory = root / kind.name / config.name / str(kind.VERSION)
  if not _is_complete(directory, kind):
    try:
      _build(kind, directory, root, config)
    except OSError as error:
      raise UserError(f"cannot write the data set {kind.name}: {error}") from error
  advice = f"delete {directory}; its rows are then generated again"
  return records.Records(directory, split, advice=advice)


def rng_of(seed: int, stream: int, split: str, i: int) -> np.random.Generator:
  """Returns the random generator of row `i` of a split; `stream` numbers the data set."""
  return np.random.default_rng([seed, stream, SPLITS.index(split), i])


def to_png(image: np.ndarray) -> bytes:
  """Encodes an image, uint8 [H, W, 3], as a PNG file."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG", compress_level=3)
  return file.getvalue()


def _data_dir(data_dir: str | os.PathLike | None) -> Path:
  name = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or _default_data_dir())
  if "://" in name:
    raise UserError(
      f"generated data sets need a local TFDS directory (got {name}): set TFDS_DATA_DIR "
      "to a local directory"
    )
  try:
    return user_path(name)
  except UserError as error:
    raise UserError(f"{error}: set TFDS_DATA_DIR to a writable directory") from error


def _default_data_dir() -> Path:
  """Returns TFDS's own default, or a temporary directory if the home is not writable."""
  default = Path("~/tensorflow_datasets")
  try:
    default = default.expanduser()
  except RuntimeError:  # HOME is not set and the user is not in the password database
    default = Path()
  above = next((p for p in (default, *default.parents) if p.exists()), default)
  if default.is_absolute() and os.access(above, os.W_OK | os.X_OK):
    return default
  return Path(tempfile.gettempdir()) / f"tensorflow_datasets-{os.getuid()}"


def _build(
  kind: type[StoredBuilder], directory: Path, root: Path, config: tfds.core.BuilderConfig
) -> None:
  """Generates a data set under a lock, unless another process has done so meanwhile."""
  directory.parent.mkdir(parents=True, exist_ok=True)
  with filelock.FileLock(directory.parent / ".lock"):
    if _is_complete(directory, kind):
      return
    # A rename is atomic, so an interrupted removal leaves no part of the old data set here.
    if directory.exists():
      directory.rename(directory.with_name(f"incomplete.{uuid.uuid4().hex}"))
    for rest in directory.parent.glob("incomplete.*"):  # tfds uses this name, too
      shutil.rmtree(rest)
    builder = kind(config=config, data_dir=root, file_format="array_record")
    tfds.disable_progress_bar()  # its bars lack a total; the builders show bars with one
    try:
      # tfds prints "Downloading ..." to stdout, which is misleading here.
      with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    finally:
      tfds.enable_progress_bar()


def _is_record(value: Any) -> bool:
  return isinstance(value, dict) and isinstance(value.get("sizes"), dict)


def _is_complete(directory: Path, kind: type[StoredBuilder]) -> bool:
  """Checks that all files have their sizes and were generated by the current code."""
  try:
    record = workdir.read_json(directory / _MARKER, _is_record)
    sizes = {name: (directory / name).stat().st_size for name in record["sizes"]}
  except (OSError, ValueError, DamagedError):
    return False
  return record == {"code": _fingerprint(kind), "sizes": sizes}


def _fingerprint(kind: type[StoredBuilder]) -> str:
  """Hashes the source code that determines the rows."""
  here = (sys.modules[__name__], sys.modules[kind.__module__])
  source = "".join(inspect.getsource(module) for module in (*kind.SOURCES, *here))
  return hashlib.sha256(source.encode()).hexdigest()[:16]
