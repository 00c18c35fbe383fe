"""Lookup of scorers' weights and vocabularies: local directories, then the Hugging Face Hub.

`$JAXPREF_SCORERS/<family>.<name>/` (by default `~/.cache/jaxpref/scorers/...`) holds
`model.safetensors`, perhaps `config.json`, and the tokenizer's files.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.errors import UserError
from jaxpref.models import config_files, hub, torch_layout, weights
from jaxpref.runtime.paths import user_path
from jaxpref.scorers.base import Published

ROOT = "JAXPREF_SCORERS"
# Any published CLIP has this vocabulary. These repositories are asked if no directory has it.
CLIP_VOCABULARY = "openai/clip-vit-large-patch14"
BERT_VOCABULARY = "google-bert/bert-base-uncased"
_STEM = "model"  # of weight files, without suffixes
_CLIPS = ("clip.h14", "clip.l14", "pickscore.v1", "hpsv2.v2_0", "hpsv2.v2_1")


def directory_of(name: str) -> Path:
  """Returns the local directory of a scorer's files; it may be missing."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return user_path(os.environ.get(ROOT) or f"{cache}/jaxpref/scorers") / name


def find_weights(published: Published) -> Path:
  """Returns the directory of a scorer's weights; downloads safetensors from the Hub.

  Raises:
    UserError: they are missing; the message says where they are published, and how to get them.
  """
  local = directory_of(published.name)
  if weights.choose(weights.files_in(local), _STEM, ""):
    return local
  target = local / "model.safetensors"
  if not published.hub:
    raise UserError(
      f"{target} is missing: get {published.file} from {published.where} and convert it once "
      f"where PyTorch is installed: python -m jaxpref.scorers.convert {published.name} "
      f"{published.file}"
    )

  def choose(files: Iterable[str]) -> list[str]:
    there = set(files)
    found = weights.choose(there, _STEM, "")
    if found is None:
      raise weights.no_weights_error(there, _STEM, "", published.hub)
    return [f for f in ("config.json", *found[1], *hub.TOKENIZER_FILES) if f in there]

  try:
    return hub.download(published.hub, choose, whole=True)
  except UserError as error:
    raise UserError(
      f"{target} is missing ({published.where} has it, with config.json and the tokenizer's "
      f"files): {error}"
    ) from error


def read_config(directory: Path, default: Mapping[str, Any]) -> dict[str, Any]:
  """Reads `config.json` beside the weights; without one, returns the published model's.

  Raises:
    UserError: it cannot be read, or has a number that no model has.
  """
  if not (file := directory / "config.json").exists():
    return dict(default)
  config = config_files.read_json(file)
  for part in (config, *(value for value in config.values() if isinstance(value, dict))):
    config_files.check_bounds(part, file)
  return config


def build_module(
  directory: Path,
  default: Mapping[str, Any],
  build: Callable[..., Any],
  dtype: Any,
) -> Any:
  """Builds a model's module for the configuration beside its weights.

  Args:
    directory: of the weights.
    default: see `read_config`.
    build: (configuration, dtype=) -> module.
    dtype: of the computation.

  Raises:
    UserError: the configuration cannot be read, or does not suit the model.
  """
  config = read_config(directory, default)
  try:
    return build(config, dtype=np.dtype(dtype))
  except UserError as error:
    raise UserError(f"{directory / 'config.json'}: {error}") from error


def read_params(directory: Path, abstract: Any, *, ignored: Callable[[str], bool]) -> Any:
  """Reads a directory's tensors as the tree `abstract`, in its dtypes, as numpy arrays.

  Args:
    directory: from `find_weights`.
    abstract: shapes and dtypes of the module's parameters.
    ignored: whether a tensor of this name may be left out, such as a buffer.

  Raises:
    UserError: tensors are missing, surplus, or of another shape; names the first few.
  """
  tensors = weights.open_part(directory, _STEM)
  tensors = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  torch_layout.check_tensors(shapes, abstract, where=str(directory))
  return torch_layout.import_tensors(tensors, abstract, where=str(directory))[0]


def find_clip_vocabulary(directory: Path, *, cleaning: str) -> Path:
  """Returns a directory with CLIP's vocabulary: this one, another scorer's, or the Hub's.

  Args:
    directory: of the scorer's weights.
    cleaning: see `jaxpref.scorers.base.Cosine`; 'ftfy' needs vocab.json and merges.txt.

  Raises:
    UserError: no directory has it, and the Hub cannot be reached.
  """
  kinds = [("vocab.json", "merges.txt")] + ([("tokenizer.json",)] * (cleaning == "fast"))

  def has_it(place: Path) -> bool:
    return any(all((place / file).exists() for file in kind) for kind in kinds)

  for place in (directory, *map(directory_of, _CLIPS)):
    if has_it(place):
      return place
  return _download_vocabulary(CLIP_VOCABULARY, hub.TOKENIZER_FILES, directory)


def find_bert_vocabulary(directory: Path) -> Path:
  """Returns a directory with the vocabulary of BERT uncased: this one, or the Hub's.

  Raises:
    UserError: it does not have it, and the Hub cannot be reached.
  """
  if (directory / "vocab.txt").exists():
    return directory
  return _download_vocabulary(BERT_VOCABULARY, ("vocab.txt",), directory)


def _download_vocabulary(repo: str, names: Iterable[str], directory: Path) -> Path:
  try:
    return hub.download(repo, lambda files: sorted(set(names) & set(files)), whole=False)
  except UserError as error:
    raise UserError(
      f"{directory} has no vocabulary: copy {' or '.join(sorted(names))} of {repo} into it "
      f"({error})"
    ) from error
