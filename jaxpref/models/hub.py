"""Pipelines by name: one that ships with the package, a directory, or a Hugging Face hub id."""

import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from jaxpref.errors import UserError
from jaxpref.models import weights
from jaxpref.paths import user_path

BUNDLED = {"shapes": Path(__file__).parent.parent / "pipelines" / "shapes"}
# Of these repositories the package has the configuration files, so that planning needs no
# network.
_DESCRIBED = {
  "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
  "stabilityai/stable-diffusion-2-1": "sd21",
  "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WEIGHTED = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZER_FILES = (
  "vocab.json",
  "merges.txt",
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
)


def find_pipeline(name: str, *, variant: str = "", configs_only: bool = False) -> Path:
  """The directory that `name` stands for.

  Args:
    name: 'shapes' for the bundled pipeline, a directory in diffusers' layout, or the id of
      a repository on the Hugging Face hub, of which the files needed are downloaded once.
    variant: of the weights, see `weights.open_part`.
    configs_only: download no more than the configuration files, which the package itself
      has of the best-known repositories.

  Raises:
    UserError: it is a file, or there is neither such a directory nor such a repository, or
      the hub cannot be reached.
  """
  if name in BUNDLED:
    return BUNDLED[name]
  path = user_path(name)
  if path.is_file():
    raise weights.refuse_file(path)
  if path.is_dir():
    if not (path / INDEX).exists():
      _refuse_directory(path)
    return path
  if configs_only and name in _DESCRIBED:
    return BUNDLED["shapes"].parent / _DESCRIBED[name]
  if not _HUB_ID.fullmatch(name):
    raise UserError(f"there is no directory {path}, and it is no id of the Hugging Face hub")
  return _download(name, variant, configs_only=configs_only)


def _refuse_directory(path: Path) -> None:
  """Raises what a directory without an index may be instead."""
  if (path / "pipeline" / INDEX).exists():
    raise UserError(f"{path} is a pretraining run: its pipeline is {path / 'pipeline'}")
  for file in sorted(path.glob("*")):  # an adapter's directory, for example
    if file.suffix in (".safetensors", *weights.PICKLES):
      raise weights.refuse_file(file)
  raise UserError(f"no {path / INDEX}: not a complete pipeline in diffusers' layout")


def _download(repo: str, variant: str, *, configs_only: bool) -> Path:
  try:
    files = huggingface_hub.HfApi().list_repo_files(repo)
  except hub_errors.RepositoryNotFoundError as error:
    raise UserError(
      f"{repo} is neither a directory nor a public repository of the Hugging Face hub; for a "
      "private or gated one, log in with `hf auth login`"
    ) from error
  except hub_errors.HFValidationError as error:
    raise UserError(f"{repo} is neither a directory nor an id of the hub: {error}") from error
  except (hub_errors.HfHubHTTPError, OSError) as error:
    if (cached := _cached(repo, variant, configs_only=configs_only)) is not None:
      return cached
    raise UserError(
      f"{repo} is no directory, is not whole in the cache of the Hugging Face hub, and the "
      f"hub cannot be asked: {_root(error)}"
    ) from error
  wanted = needed_files(files, variant=variant, where=repo)
  if configs_only:
    wanted = [file for file in wanted if file == INDEX or file.endswith("config.json")]
  try:
    return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
  except (hub_errors.HfHubHTTPError, OSError) as error:
    raise UserError(f"the download of {repo} failed: {_root(error)}") from error


def _root(error: BaseException) -> str:
  """The first line of what went wrong in the end."""
  while (deeper := error.__cause__ or error.__context__) is not None:
    error = deeper
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cached(repo: str, variant: str, *, configs_only: bool) -> Path | None:
  """The snapshot that an earlier download has left, if it is whole."""
  try:
    path = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    if configs_only:  # what is missing will be named when it is read
      return path
    files = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    needed_files(files, variant=variant, where=repo)
  except (OSError, UserError):
    return None
  return path


def needed_files(files: Iterable[str], *, variant: str = "", where: str) -> list[str]:
  """Those of a repository's files that `load_pipeline` reads.

  Args:
    files: all its paths.
    variant: of the weights; with '' the full ones, of parts that have none fp16's.
    where: named in errors.

  Raises:
    UserError: they make no pipeline, or some of its weights are pickled or have no such
      variant.
  """
  there = set(files)
  if INDEX not in there:
    found = sorted(f for f in there if f.endswith((".safetensors", *weights.PICKLES)))
    rest = f": it holds {', '.join(found[:3])}" if found else ""
    raise UserError(f"{where} has no {INDEX}, so it is no pipeline in diffusers' layout{rest}")
  wanted = [INDEX, "scheduler/scheduler_config.json"]
  for part in _WEIGHTED:
    if f"{part}/config.json" not in there:
      if part != "text_encoder_2":
        raise UserError(f"{where} has no {part}/config.json: not a complete pipeline")
      continue
    wanted.append(f"{part}/config.json")
    kinds = (variant,) if variant else ("", "fp16")
    stem = f"{part}/{weights.stem_of(part)}"
    found = next((f for kind in kinds if (f := _weight_files(there, stem, kind))), [])
    if not found:
      pickles = [f for f in sorted(there) if f.startswith(part) and f.endswith(weights.PICKLES)]
      if pickles:
        raise weights.pickled(Path(where) / pickles[0])
      kind = f" of the variant {variant}" if variant else ""
      raise UserError(f"{where} has no weights{kind} for its {part}")
    wanted += found
  for tokenizer in ("tokenizer", "tokenizer_2"):
    wanted += [f"{tokenizer}/{file}" for file in _TOKENIZER_FILES]
  return [file for file in wanted if file in there]


def _weight_files(there: set[str], stem: str, variant: str) -> list[str]:
  dot = f".{variant}" if variant else ""
  if (single := f"{stem}{dot}.safetensors") in there:
    return [single]
  if (index := f"{stem}.safetensors.index{dot}.json") in there:
    number, dot = r"-\d+-of-\d+", re.escape(dot)
    # The variant stood behind the number until diffusers 0.29.
    shard = re.compile(rf"{re.escape(stem)}(?:{dot}{number}|{number}{dot})\.safetensors")
    shards = sorted(file for file in there if shard.fullmatch(file))
    return [index, *shards] if shards else []
  return []
