"""The model families: a record for each, in a module of its own with the name `FAMILY`."""

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxpref.errors import UserError
from jaxpref.models.families import stable_diffusion
from jaxpref.models.families.family import Family

# Pipelines of another task than to make an image of a text.
_OTHER_TASKS = ("Inpaint", "Upscale", "ControlNet", "Adapter", "InstructPix2Pix")


def _found() -> Iterable[Family]:
  for module in pkgutil.iter_modules(__path__, f"{__name__}."):
    family = getattr(importlib.import_module(module.name), "FAMILY", None)
    if family not in (None, stable_diffusion.FAMILY):
      yield family


# The first is that of an index that does not name a pipeline.
FAMILIES = (stable_diffusion.FAMILY, *_found())
# Names of the parts that are trained, and of all parts.
DENOISERS = tuple(dict.fromkeys(family.denoiser for family in FAMILIES))
PARTS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts))


def of_index(index: Mapping[str, Any], *, where: Path) -> Family:
  """Returns the family of a `model_index.json`.

  Args:
    index: its contents.
    where: the file, for the error message.

  Raises:
    UserError: no family has such pipelines.
  """
  if "_class_name" not in index:
    kinds = {name: of[1] for name, of in index.items() if isinstance(of, list) and len(of) == 2}
    return of_parts(parts_in(index), kinds)
  name = str(index["_class_name"])
  for family in FAMILIES:
    if name.startswith(family.pipelines) and not any(task in name for task in _OTHER_TASKS):
      return family
  known = ", ".join(family.name for family in FAMILIES)
  raise UserError(f"{where} is of {name}, and jaxpref has only {known}")


def of_parts(parts: Collection[str], kinds: Mapping[str, Any] = MappingProxyType({})) -> Family:
  """Returns the family that these parts fit best; several may have the same parts.

  Args:
    parts: names of the parts.
    kinds: names of the parts' classes in diffusers, of those where they are known.
  """

  def distance(family: Family) -> tuple[int, bool, int]:
    missing = [part for part in family.required if part not in parts]
    own = family.index[family.denoiser][1]
    other = kinds.get(family.denoiser, own) != own
    return len(missing), other, -len(set(parts) & family.parts.keys())

  return min(FAMILIES, key=distance)


def of_configs(configs: Mapping[str, Mapping[str, Any]]) -> Family:
  """Returns the family of configurations by part, which may have a 'model_index'."""
  index = configs.get("model_index")
  if index is not None:
    return of_index(index, where=Path("model_index"))
  kinds = {part: config.get("_class_name") for part, config in configs.items()}
  return of_parts(configs, {part: kind for part, kind in kinds.items() if kind})


def parts_in(index: Mapping[str, Any]) -> set[str]:
  """Returns the names in a `model_index.json` of parts, tokenizers and others that exist."""
  return {name for name, component in index.items() if component != [None, None]}
