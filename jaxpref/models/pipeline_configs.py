"""Reading of a pipeline's configuration files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.diffusion import flow
from jaxpref.errors import UserError
from jaxpref.models import config_files, families
from jaxpref.models.families.family import Family

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


def read_index(path: Path) -> tuple[dict[str, Any], Family]:
  """Reads the index of the pipeline in a directory; also returns the family.

  Raises:
    UserError: it is missing or invalid, lacks a part, or jaxpref does not have the family.
  """
  index = config_files.read_json(path / INDEX)
  family, there = families.of_index(index, where=path / INDEX), families.parts_in(index)
  used = {*family.required, *(there & family.parts.keys())}
  tokenizers = {tokenizer.folder for tokenizer in family.tokenizers(used).values()}
  if missing := {*used, *tokenizers, "scheduler"} - there:
    raise UserError(f"{path / INDEX} lacks {', '.join(sorted(missing))}")
  return index, family


def read_configs(
  path: Path, index: Mapping[str, Any], family: Family, places: Mapping[str, Path]
) -> Mapping[str, Mapping[str, Any]]:
  """Reads, checks and corrects a pipeline's configuration files.

  Args:
    path: the pipeline's directory.
    index: from `read_index`.
    family: from `read_index`.
    places: directories of the parts that the pipeline has.

  Returns:
    Contents by part, with 'model_index' and 'scheduler'.

  Raises:
    UserError: a file is missing or invalid.
  """
  configs = {"model_index": dict(index)}
  for part, place in places.items():
    of, file = family.parts[part], place / "config.json"
    config = of.read(config_files.read_json(file), index[part])
    config_files.check_bounds(config, file)
    config_files.warn_of_fields(config, known=of.fields, needed=of.needed, where=file)
    configs[part] = config
  file, kind = path / SCHEDULER, family.scheduler
  configs["scheduler"] = config = config_files.read_json(file)
  config_files.check_bounds(config, file)
  needed = flow.needed_fields(config) if flow.is_flow(config) else kind.needed
  config_files.warn_of_fields(config, known=kind.fields, needed=needed, where=file)
  return family.correct(configs, where=str(path))
