"""Fields of diffusion transformers' configurations: reading and checking."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxpref.errors import UserError
from jaxpref.models import config_files

# Fields of the modules that a configuration does not have, or by another name.
_OWN = {"t5_tokens", "options", "remat", "dtype", "parent", "name"}


def of_module(module: type[nn.Module]) -> frozenset[str]:
  """Returns the names of the configuration's fields of a module."""
  return frozenset(module.__dataclass_fields__) - _OWN


def read(module: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a module's fields that a configuration sets; lists become tuples.

  Args:
    module: a class whose fields have default values of the kinds that they take.
    config: the contents of the file.

  Raises:
    UserError: a field is not of its kind: a size that is not a positive integer, a flag that is
      not a boolean, a list of other things than integers.
  """
  fields = {}
  for name in sorted(of_module(module) & config.keys()):
    value = tuple(config[name]) if isinstance(config[name], list) else config[name]
    declared = module.__dataclass_fields__[name].type
    kind = declared.__name__ if isinstance(declared, type) else str(declared)
    if not _is_kind(value, kind):
      raise UserError(
        f"{name} must be {_KINDS[kind]} in the transformer's configuration (got "
        f"{config_files.brief(config[name])})"
      )
    fields[name] = value
  return fields


def require(config: Mapping[str, Any], *rules: tuple[str, bool, str]) -> None:
  """Raises a UserError for the first field that breaks its rule.

  Args:
    config: the contents of the file.
    *rules: name, whether the value is allowed, and what is allowed.
  """
  for name, allowed, wanted in rules:
    if not allowed:
      given = f"got {config_files.brief(config[name])}" if name in config else "it is missing"
      raise UserError(f"{name} must be {wanted}, in the transformer's configuration ({given})")


_KINDS = {
  "int": "a positive integer",
  "int | None": "a positive integer or null",
  "bool": "true or false",
  "float": "a positive number",
  "float | None": "a positive number or null",
  "str | None": "a string or null",
  "tuple[int, ...]": "a list of integers from 0",
}


def _is_kind(value: Any, kind: str) -> bool:
  if value is None:
    return kind.endswith("None")
  if kind == "bool":
    return isinstance(value, bool)
  if kind.startswith("float"):
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
  if kind.startswith("str"):
    return isinstance(value, str)
  if kind.startswith("tuple"):
    return isinstance(value, tuple) and all(_is_whole(v, 0) for v in value)
  return _is_whole(value, 1)


def _is_whole(value: Any, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least
