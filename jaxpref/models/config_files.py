"""Reading and checking the JSON files of a pipeline."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxpref.errors import UserError, listed

_log = logging.getLogger(__name__)
_Record = TypeVar("_Record")
_MAX_BYTES = 64 << 20  # a tokenizer.json of 50,000 words takes 4 MB
_MAX_VALUES = 100  # in a list, which has one value per block of a network
_MAX_INTEGER = 2**31 - 1
# The largest values that a module can be built with; real models use about a tenth of them.
_MOST = {
  "layers_per_block": 50,
  "num_hidden_layers": 200,
  "num_layers": 200,
  "num_single_layers": 200,
  "num_train_timesteps": 100_000,
  "pos_embed_max_size": 2048,
  "reverse_transformer_layers_per_block": 100,
  "sample_size": 16_384,
  "transformer_layers_per_block": 100,
}
_LONG_LISTS = ("trained_betas",)  # one value per timestep


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file that holds a JSON object.

  Raises:
    UserError: it is missing, not a regular file, too large, nested too deeply, or not JSON.
  """
  check_regular(path)
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(
      f"{path} is missing: not a complete pipeline in diffusers' layout"
    ) from error
  except RecursionError as error:
    raise UserError(f"cannot read {path}: it is nested too deeply") from error
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} does not hold a JSON object")
  return value


def check_regular(path: Path) -> None:
  """Refuses files that could not be read in bounded time: pipes, devices and huge files.

  Args:
    path: a file to be read whole; it may be missing.

  Raises:
    UserError: it is not a regular file, or is larger than any configuration.
  """
  if not path.exists():
    return
  if not path.is_file():
    raise UserError(f"{path} is not a regular file")
  if (size := path.stat().st_size) > _MAX_BYTES:
    raise UserError(f"{path} has {size >> 20} MB, more than a pipeline's JSON can have")


def check_bounds(config: Mapping[str, Any], where: Path) -> None:
  """Refuses numbers that no module could be built with, before anything is built.

  Args:
    config: the contents of a configuration file.
    where: that file, for errors.

  Raises:
    UserError: a number or a list is larger than in any model; the message names the field.
  """
  for field, value in config.items():
    most = _MOST.get(field, _MAX_INTEGER)
    if isinstance(value, list) and len(value) > _MAX_VALUES and field not in _LONG_LISTS:
      raise UserError(
        f"{where}: {field} must have at most {_MAX_VALUES} values (got {len(value)})"
      )
    for number in _numbers(value):
      # Floats that are not sizes may be infinite.
      if abs(number) > most and (isinstance(number, int) or field in _MOST):
        raise UserError(f"{where}: {field} must be at most {most} (got {brief(number)})")


def _numbers(value: Any) -> Iterator[float]:
  rest = [value]
  while rest:
    if isinstance(item := rest.pop(), list):
      rest += item
    elif isinstance(item, int | float):
      yield item


def make_record(
  record: type[_Record], config: Mapping[str, Any], supported: Mapping[str, Any]
) -> _Record:
  """Makes a dataclass from a configuration's fields of the same names.

  Args:
    record: the dataclass. Its integers must be positive; fields without a default are required.
    config: a configuration file's contents; fields that `record` lacks are ignored.
    supported: the only value that is implemented, for fields that `record` lacks. A missing
      field has that value.

  Raises:
    UserError: a field is missing, of another type or not supported; the message names it.
  """
  for name, value in supported.items():
    if config.get(name, value) != value:
      raise UserError(f"{name} must be {value!r} (got {brief(config[name])})")
  values = {}
  for field in dataclasses.fields(record):  # type: ignore[arg-type]
    if field.name not in config:
      if field.default is dataclasses.MISSING:
        raise UserError(f"{field.name} is missing")
      continue
    values[field.name] = value = config[field.name]
    if field.type is int:
      if type(value) is not int or value < 1:
        raise UserError(f"{field.name} must be a positive whole number (got {brief(value)})")
    elif field.type is float and (type(value) not in (int, float) or not value > 0):
      raise UserError(f"{field.name} must be a positive number (got {brief(value)})")
  return record(**values)


def brief(value: Any) -> str:
  """Formats a value for an error message, cut to 60 characters."""
  try:
    text = repr(value)
  except ValueError:  # Python does not print integers of more than 4,300 digits
    return "an integer of thousands of digits"
  return text if len(text) <= 60 else f"{text[:57]}..."


def warn_of_fields(
  config: Mapping[str, Any], *, known: Iterable[str], needed: Iterable[str], where: Path
) -> None:
  """Warns of unknown fields, and of missing fields that every published file has.

  Either may be a misspelling. The default then replaces the value that the model was trained
  with, and its images are nonsense.

  Args:
    config: the contents of a configuration file.
    known: names of all its fields; fields that begin with an underscore are always known.
    needed: names of the fields that every published file has. For all others, published files
      of old models rely on the defaults.
    where: that file.
  """
  unknown = sorted(k for k in config.keys() - set(known) if not k.startswith("_"))
  missing = [k for k in needed if k not in config]
  said = []
  if unknown:
    said.append(f"ignores fields it does not know: {listed(unknown, 5)}")
  if missing:
    said.append(f"takes defaults for missing fields: {listed(missing, 5)}")
  if said:
    _log.warning("%s: jaxpref %s", where, "; and ".join(said))
