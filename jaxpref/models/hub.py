"""Lookup of pipelines by name: bundled ones, directories, and Hugging Face Hub ids."""

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from jaxpref.errors import UserError
from jaxpref.models import families, weights
from jaxpref.runtime.paths import user_path

BUNDLED = {"shapes": Path(__file__).parent.parent / "pipelines" / "shapes"}
# The package has the configuration files of these repositories, so that planning needs no
# network.
_DESCRIBED = {
  "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
  "stabilityai/stable-diffusion-2-1": "sd21",
  "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
  "stabilityai/stable-diffusion-3.5-medium": "sd35m",
  "Efficient-Large-Model/Sana_600M_512px_diffusers": "sana",
  "black-forest-labs/FLUX.1-dev": "flux",
  "black-forest-labs/FLUX.1-schnell": "flux_schnell",
}
INDEX = "model_index.json"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w.][\w./-]*))?")
_URL = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)")
# Files that accelerate and transformers' Trainer save beside the trained weights.
_TRAINING_STATE = (
  *("optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt"),
  *("random_states_0.pkl", "rng_state.pth", "trainer_state.json"),
)
# Names of the parts that a field of the configuration's section `model` replaces.
_REPLACED = {"unet": families.DENOISERS, "vae": ("vae",)}
TOKENIZER_FILES = (
  "vocab.json",
  "merges.txt",
  "tokenizer.json",
  "tokenizer_config.json",
  "added_tokens.json",
  "special_tokens_map.json",
)


def find_pipeline(
  name: str, *, variant: str = "", configs_only: bool = False, without: Collection[str] = ()
) -> Path:
  """Returns the directory of a pipeline; downloads it if necessary.

  Args:
    name: 'shapes' for the bundled pipeline, a directory in diffusers' layout or in the Hub's
      cache, or the id of a repository on the Hugging Face Hub, perhaps with `@revision`. Of a
      repository only the files needed are downloaded, once.
    variant: of the weights, see `weights.choose`.
    configs_only: download only the configuration files; the package itself has those of the
      best-known repositories.
    without: fields that replace parts, which are not needed then: 'unet', 'vae'.

  Raises:
    UserError: neither a pipeline's directory nor a repository has this name, or the Hub cannot
      be reached.
  """
  if name in BUNDLED:
    return BUNDLED[name]
  if (path := _local(name)) is not None:
    if not (path / INDEX).exists():
      _refuse_directory(path)
    return path
  if configs_only and name in _DESCRIBED:
    return BUNDLED["shapes"].parent / _DESCRIBED[name]

  def choose(files):
    wanted = needed_files(files, variant=variant, where=name, without=without)
    if configs_only:
      return [file for file in wanted if file == INDEX or file.endswith("config.json")]
    return wanted

  return download(name, choose, whole=not configs_only)


def find_part(name: str, field: str, *, variant: str = "", configs_only: bool = False) -> Path:
  """Returns the directory of a part that replaces the pipeline's own.

  Args:
    name: a directory with `config.json` and weights, or with the part as a subdirectory, or a
      Hub repository with either layout.
    field: 'unet' for the denoiser, or 'vae'.
    variant: of the weights, see `weights.choose`.
    configs_only: download only the configuration file.

  Raises:
    UserError: the part does not exist.
  """
  parts = _REPLACED[field]
  try:
    path = BUNDLED.get(name) or _local(name)
    if path is None:

      def choose(files):
        there = set(files)
        part = next((p for p in parts if f"{p}/config.json" in there), field)
        wanted = _part_files(there, part, variant=variant, where=name)
        return wanted[:1] if configs_only else wanted

      path = download(name, choose, whole=not configs_only)
    for part in parts:
      if (path / part / "config.json").exists():
        return path / part
    if not (path / "config.json").exists() or _is_run(path):
      raise UserError(f"{path} is not a {field}: it has neither config.json nor {field}/")
    return path
  except UserError as error:
    raise UserError(f"model.{field}: {error}") from error


def _local(name: str) -> Path | None:
  """Returns the directory of this name, or the snapshot in it if it is the Hub's cache."""
  path = user_path(name)
  if path.exists() and not path.is_dir():
    raise weights.file_error(path)
  if not path.is_dir():
    return None
  cache = path.parent if path.name == "snapshots" else path
  if (cache / "snapshots").is_dir() and cache.name.startswith("models--"):
    try:
      named = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
      named = ""
    snapshots = sorted(p for p in (cache / "snapshots").iterdir() if p.is_dir())
    if named and (cache / "snapshots" / named) in snapshots:
      return cache / "snapshots" / named
    if len(snapshots) == 1:
      return snapshots[0]
    raise UserError(
      f"{path} is a cache of the Hub with {len(snapshots)} snapshots: name one of them"
    )
  return path


def _is_run(path: Path) -> bool:
  """Returns whether a directory is the workdir of a run."""
  return (path / "config.json").is_file() and (
    (path / "checkpoints").is_dir() or (path / "starts.json").is_file()
  )


def _refuse_directory(path: Path) -> None:
  """Raises an error that says what a directory without `model_index.json` is instead."""
  if (path / "pipeline" / INDEX).exists():
    raise UserError(f"{path} is a pretraining run: its pipeline is {path / 'pipeline'}")
  if _is_run(path):
    raise UserError(
      f"{path} is a run's workdir: set model.start to it to train from it, or make a pipeline "
      "of it with `python -m jaxpref.export`"
    )
  for file in sorted(path.glob("*")):  # for example an adapter's directory
    if file.suffix == ".safetensors" and not (path / "config.json").exists():
      raise weights.file_error(file)
  names = (*(f"{d}{end}" for d in families.DENOISERS for end in ("", "_ema")), "vae")
  inside = [name for name in names if (path / name / "config.json").exists()]
  if any((path / name).exists() for name in _TRAINING_STATE):
    way = f": its denoiser is model.unet={path / inside[0]}" if inside else ""
    raise UserError(
      f"{path} is a training state, not a pipeline: name the pipeline that it was trained "
      f"on{way}"
    )
  if (path / "config.json").exists():
    of = path.parent if (path.parent / INDEX).exists() else None
    way = f"name {of}" if of else "name the whole pipeline"
    part = path.name if path.name in families.PARTS else "unet"
    field = "" if of else _field_of(part)
    and_this = f", and this as model.{field}" if field else ""
    raise UserError(f"{path} is one part of a pipeline: {way}{and_this}")
  if inside:
    raise UserError(
      f"{path} holds {inside[0]} alone, not a complete pipeline: name its base as model.path, "
      f"and this as model.{_field_of(inside[0].removesuffix('_ema'))}"
    )
  if any(path.glob("models--*")):
    raise UserError(f"{path} is the Hub's cache: name a model by its id, such as org/name")
  for file in sorted(path.glob("*")):
    if file.suffix in weights.PICKLES:
      raise weights.file_error(file)
  if run := next((p for p in list(path.resolve().parents)[:3] if _is_run(p)), None):
    raise UserError(f"{path} is inside the workdir of a run: name {run}")
  raise UserError(f"{path / INDEX} is missing: not a complete pipeline in diffusers' layout")


def _field_of(part: str) -> str:
  """Returns the field of the configuration that replaces a part, or ''."""
  return next((field for field, parts in _REPLACED.items() if part in parts), "")


def download(name: str, choose: Callable[[Iterable[str]], list[str]], *, whole: bool) -> Path:
  """Downloads the chosen files of a repository; returns their directory.

  Args:
    name: the repository's id, perhaps with `@revision`.
    choose: (files) -> the files to download; raises a UserError if they cannot be used.
    whole: without a connection, accept an earlier download only if it has all chosen files.
  """
  path = user_path(name)
  if url := _URL.match(name):
    raise UserError(f"{name} is a URL: name the id, {url[1]}, perhaps with @revision")
  if not (match := _HUB_ID.fullmatch(name)):
    raise UserError(f"{path} is neither a directory nor a Hub id such as org/name")
  repo, revision = match["repo"], match["revision"]
  try:
    files = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
  except hub_errors.RevisionNotFoundError as error:
    raise UserError(f"{repo} has no revision {revision!r}") from error
  except hub_errors.RepositoryNotFoundError as error:
    raise UserError(
      f"{repo} is neither a directory nor a public repository of the Hugging Face Hub; for a "
      "private or gated one, log in with `hf auth login`"
    ) from error
  except hub_errors.HFValidationError as error:
    raise UserError(f"{repo} is neither a directory nor a Hub id: {error}") from error
  except (hub_errors.HfHubHTTPError, OSError) as error:
    if (cached := _cached(repo, revision, choose if whole else None)) is not None:
      return cached
    raise UserError(
      f"{name} is not a directory and not completely in the Hub's cache, and the Hugging Face "
      f"Hub cannot be reached: {_root(error)}"
    ) from error
  wanted = choose(files)
  try:
    return Path(
      huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=wanted)
    )
  except (hub_errors.HfHubHTTPError, OSError) as error:
    raise UserError(f"the download of {name} failed: {_root(error)}") from error


def _root(error: BaseException) -> str:
  """Returns the first line of the error at the end of the chain of causes."""
  while (deeper := error.__cause__ or error.__context__) is not None:
    error = deeper
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cached(
  repo: str, revision: str | None, choose: Callable[[Iterable[str]], list[str]] | None
) -> Path | None:
  """Returns the snapshot of an earlier download, if it is complete."""
  try:
    path = Path(
      huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
    )
    if choose is not None:  # otherwise a missing file is reported when it is read
      choose([p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()])
  except (OSError, UserError):
    return None
  return path


def needed_files(
  files: Iterable[str], *, variant: str = "", where: str, without: Collection[str] = ()
) -> list[str]:
  """Lists the files of a repository that `load_pipeline` reads.

  Args:
    files: all paths in the repository.
    variant: of the weights, for parts that have it; '' takes the full weights, or fp16's for
      parts that have only those.
    where: the repository, for error messages.
    without: as for `find_pipeline`.

  Raises:
    UserError: the files are not a pipeline, some weights are not safetensors, or no part has
      the variant.
  """
  there = set(files)
  if INDEX not in there:
    found = sorted(f for f in there if f.endswith((".safetensors", *weights.PICKLES)))
    rest = f": it holds {', '.join(found[:3])}" if found else ""
    replaceable = [part for parts in _REPLACED.values() for part in parts]
    alone = next((part for part in replaceable if f"{part}/config.json" in there), "")
    if alone or "config.json" in there:
      rest += f"; name its base as model.path, and this as model.{_field_of(alone) or 'unet'}"
    raise UserError(
      f"{where} is not a pipeline in diffusers' layout, because {INDEX} is missing{rest}"
    )
  wanted, kinds = [INDEX, "scheduler/scheduler_config.json"], []
  replaced = {part for field in without for part in _REPLACED[field]}
  # The index is not downloaded yet; the parts tell the family.
  family = families.of_parts({file.partition("/")[0] for file in there if "/" in file})
  for name, part in family.parts.items():
    if name not in replaced:
      if f"{name}/config.json" not in there:
        if not part.is_optional:
          raise UserError(f"{where}: {name}/config.json is missing: not a complete pipeline")
        continue
      of_part = _part_files(there, name, variant=variant, where=where)
      kinds += [f".{variant}" in file for file in of_part[1:2]]
      wanted += of_part
    if part.tokenizer:
      wanted += [f"{part.tokenizer.folder}/{file}" for file in TOKENIZER_FILES]
  if variant and not any(kinds):
    raise UserError(f"{where} does not have weights of the variant {variant}")
  return [file for file in wanted if file in there]


def _part_files(there: set[str], part: str, *, variant: str, where: str) -> list[str]:
  """Lists the configuration and weights of a part, in its subdirectory or at the top."""
  folder = f"{part}/" if f"{part}/config.json" in there else ""
  if f"{folder}config.json" not in there:
    raise UserError(f"{where} has neither {part}/config.json nor config.json")
  names = [f.removeprefix(folder) for f in there if f.startswith(folder)]
  names = [name for name in names if "/" not in name]
  stem = next(family.parts[part].stem for family in families.FAMILIES if part in family.parts)
  found = weights.choose(names, stem, variant)
  if found is None:
    raise weights.no_weights_error(names, stem, variant, f"{where}/{folder}".rstrip("/"))
  if found[1][-1].endswith(".json"):
    raise UserError(f"{where}: {folder}{found[1][0]} names shards that are missing")
  return [f"{folder}{name}" for name in ("config.json", *found[1])]
