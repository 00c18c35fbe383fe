"""Pipelines by name: one that ships with the package, a directory, or a Hugging Face hub id."""

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from jaxpref.errors import UserError
from jaxpref.models import weights

BUNDLED = {"shapes": Path(__file__).parent.parent / "pipelines" / "shapes"}
INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZER_FILES = (
  "vocab.json",
  "merges.txt",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
)


def find_pipeline(name: str, *, variant: str = "") -> Path:
  """The directory that `name` stands for.

  Args:
    name: 'shapes' for the bundled pipeline, a directory in diffusers' layout, or the id of
      a repository on the Hugging Face hub, of which the files needed are downloaded once.
    variant: of the weights, see `weights.open_part`.

  Raises:
    UserError: it is a file, or there is neither such a directory nor such a repository, or
      the hub cannot be reached.
  """
  if name in BUNDLED:
    return BUNDLED[name]
  path = Path(name).expanduser()
  if path.is_file():
    raise weights.refuse_file(path)
  if path.is_dir() and not (path / INDEX).exists():
    for file in sorted(path.glob("*.safetensors")):  # an adapter's directory, for example
      raise weights.refuse_file(file)
  if path.is_dir() or not _HUB_ID.fullmatch(name):
    return path
  return _download(name, variant)


def _download(repo: str, variant: str) -> Path:
  try:
    files = huggingface_hub.HfApi().list_repo_files(repo)
    wanted = needed_files(files, variant=variant)
    return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
  except hub_errors.RepositoryNotFoundError as error:
    raise UserError(
      f"{repo} is neither a directory nor a public repository of the Hugging Face hub; for a "
      "private or gated one, log in with `hf auth login`"
    ) from error
  except (hub_errors.HfHubHTTPError, OSError) as error:
    cached = _cached(repo)
    if cached is None:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise UserError(
        f"{repo} is no directory, is not in the cache of the Hugging Face hub, and the hub "
        f"cannot be asked ({reason})"
      ) from error
    return cached


def _cached(repo: str) -> Path | None:
  """A snapshot that an earlier download has left, if there is one."""
  try:
    path = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
  except OSError:
    return None
  return path if (path / INDEX).exists() else None


def needed_files(files: Iterable[str], *, variant: str = "") -> list[str]:
  """Those of a repository's files that `load_pipeline` reads.

  Args:
    files: all its paths.
    variant: of the weights; with '' the full ones, of parts that have none fp16's.
  """
  there = set(files)
  wanted = [INDEX, "scheduler/scheduler_config.json"]
  for part in _WEIGHTED:
    wanted.append(f"{part}/config.json")
    for kind in (variant,) if variant else ("", "fp16"):
      found = _weight_files(there, f"{part}/{weights.stem_of(part)}", kind)
      wanted += found
      if found:
        break
  for tokenizer in ("tokenizer", "tokenizer_2"):
    wanted += [f"{tokenizer}/{file}" for file in _TOKENIZER_FILES]
  return [file for file in wanted if file in there]


def _weight_files(there: set[str], stem: str, variant: str) -> list[str]:
  dot = f".{variant}" if variant else ""
  if (single := f"{stem}{dot}.safetensors") in there:
    return [single]
  if (index := f"{stem}.safetensors.index{dot}.json") in there:
    shard = re.compile(rf"{re.escape(stem + dot)}-\d+-of-\d+\.safetensors")
    return [index, *sorted(file for file in there if shard.fullmatch(file))]
  return []
