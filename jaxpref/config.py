"""The command line: a config file, overrides of its fields, and a few flags.

`--config=configs/dro.py` or `--config=configs/dro.py:tiny` calls the file's
`get_config(preset)`; `--config=dro:tiny` finds the package's own file from any
directory; `--config.optim.lr=1e-4` overrides a field. Errors are one line. This module does not
import JAX, so that `--help` and errors appear at once.
"""

import ast
import difflib
import importlib.util
import inspect
import io
import json
import math
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from jaxpref.base_config import FIELDS_OF_ALL_LOSSES, LARGEST, LIMITS, RULES, Rules
from jaxpref.errors import UserError, failure_of

_LOSSES = Path(__file__).parent / "losses"
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


def parse_args(
  argv: list[str], *, flags: Mapping[str, str]
) -> tuple[ConfigDict, dict[str, str]]:
  """Parses the command line; `--help` prints the flags and fields and exits with 0.

  Args:
    argv: the arguments, without the program's name.
    flags: the program's other flags, name to help; each takes a value.

  Returns:
    The locked config, with `preset` set to the preset's name, and the flags given, name
    to value. The last of repeated flags counts.

  Raises:
    UserError: a flag, the config file, a field or a value is wrong.
  """
  given, overrides, wants_help = _split(argv, flags)
  if wants_help and "config" not in given:
    _print_help(flags, None, None)
  if "config" not in given:
    raise UserError("--config is missing, e.g. --config=dro")
  module, config = _load(given.pop("config"))
  if wants_help:
    _print_help(flags, module, config)
  for path, text in overrides:
    _override(config, path, text)
  return config, given


def validate(config: ConfigDict, rules: Rules = RULES) -> None:
  """Checks values; missing fields and None are not checked.

  Every number has an upper limit, in `LIMITS` or by its type. Infinity is for fields whose
  rule permits it. Rules of the section `loss` are for the package's own losses: another
  package's loss checks its hyper-parameters itself.

  Args:
    config: of any method.
    rules: dotted path to (predicate, what the value must be).

  Raises:
    UserError: the first value that breaks its rule.
  """
  fields = dict(leaves(config))
  foreign = not (_LOSSES / f"{fields.get('loss.name')}.py").exists()
  for path, (holds, meaning) in rules.items():
    section, _, name = path.partition(".")
    if foreign and section == "loss" and name not in FIELDS_OF_ALL_LOSSES:
      continue
    value = fields.get(path)
    try:
      fits = value is None or holds(value)
    except TypeError:  # a config file may set a value of any type
      fits = False
    if not fits:
      raise UserError(f"'{path}' must be {meaning}, got {value!r}")
  for path, value in fields.items():
    for number in value if isinstance(value, list | tuple) else [value]:
      infinite = isinstance(number, float) and math.isinf(number)
      if type(number) not in LARGEST or (infinite and path in rules):
        continue
      largest = LIMITS.get(path, LARGEST[type(number)])
      if not abs(number) <= largest:  # nor NaN
        raise UserError(f"'{path}' must be at most {largest:,.0f}, got {_shown(number)}")


def _shown(number: float) -> str:
  """Formats a number; Python cannot print integers of thousands of digits."""
  try:
    return repr(number)
  except ValueError:
    return "a number of thousands of digits"


def to_json(config: ConfigDict) -> str:
  """Writes a config as JSON: sorted keys, indent 2, tuples as lists."""
  return json.dumps(config.to_dict(), sort_keys=True, indent=2)


def from_json(text: str) -> ConfigDict:
  """Reads a config from `to_json`, locked; lists stay lists, None has no type."""
  return ConfigDict(json.loads(text)).lock()


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, value) of every field, sorted within its section."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _split(
  argv: list[str], flags: Mapping[str, str]
) -> tuple[dict[str, str], list[tuple[str, str]], bool]:
  given: dict[str, str] = {}
  overrides = []
  wants_help = False
  rest = list(argv)
  while rest:
    arg = rest.pop(0)
    if arg in ("-h", "--help"):
      wants_help = True
      continue
    if not arg.startswith("--"):
      raise UserError(f"unexpected argument '{arg}'; flags are written --name=value")
    name, equals, value = arg[2:].partition("=")
    if name not in ("config", *flags) and not name.startswith("config."):
      near = difflib.get_close_matches(name, ["config", "help", *flags], n=1)
      hint = f"did you mean '--{near[0]}'?" if near else "--help lists the flags"
      raise UserError(f"unknown flag '--{name}'; {hint}")
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise UserError(f"'--{name}' needs a value")
      value = rest.pop(0)
    if name.startswith("config."):
      overrides.append((name.removeprefix("config."), value))
    else:
      given[name] = value
  return given, overrides, wants_help


def load_config(argument: str) -> ConfigDict:
  """Loads a configuration, locked.

  Args:
    argument: the value of `--config`: a file or a name, and a preset behind a colon.

  Raises:
    UserError: the file, name or preset does not exist, or the file raises.
  """
  return _load(argument)[1]


def field_meanings(argument: str) -> dict[str, str]:
  """Returns the meaning of each field of a configuration, as `--help` prints it.

  Args:
    argument: as for `load_config`.

  Raises:
    UserError: the file, name or preset does not exist, or the file raises.
  """
  return _comments(_load(argument)[0])


def presets_of(argument: str) -> tuple[str, ...]:
  """Returns the names of a configuration's presets.

  Args:
    argument: as for `load_config`.

  Raises:
    UserError: the file, name or preset does not exist, or the file raises.
  """
  return tuple(getattr(_load(argument)[0], "PRESETS", ()))


def find_config(name: str) -> Path:
  """Finds a configuration file by its path, or by its name in the package.

  Raises:
    UserError: the file does not exist.
  """
  path = Path(name)
  if path.is_file():
    return path
  # An installed package has its own `configs`; a checkout has them beside the package.
  own = Path(__file__).parent / "configs"
  own = own if own.is_dir() else own.parent.parent / "configs"
  ours = {file.stem: file for file in sorted(own.glob("[!_]*.py"))}
  if name in ours:
    return ours[name]
  known = {stem: stem for stem in ours}
  if path.name != name:
    known |= {file.stem: str(file) for file in sorted(path.parent.glob("*.py"))}
  near = difflib.get_close_matches(path.stem, known, n=1)
  hint = f"did you mean '{known[near[0]]}'?" if near else f"there are {', '.join(ours)}"
  raise UserError(f"no config file '{name}'; {hint}")


def _load(argument: str) -> tuple[ModuleType, ConfigDict]:
  name, colon, preset = argument.partition(":")
  path = find_config(name)
  spec = importlib.util.spec_from_file_location(f"jaxpref_config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise UserError(f"'{name}' is not a Python file")
  module = importlib.util.module_from_spec(spec)
  # The file is the user's program: its errors are shown in one line.
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise UserError(f"{name} is not a configuration: it has no function get_config")
    parameters = inspect.signature(module.get_config).parameters
  except UserError:
    raise
  except Exception as error:
    raise UserError(failure_of(error, path)) from error
  if "preset" not in parameters:
    raise UserError(f"{name}: get_config takes no 'preset'")
  preset = preset if colon else parameters["preset"].default
  known = getattr(module, "PRESETS", None)
  if known is not None and preset not in known:
    near = difflib.get_close_matches(str(preset), known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"{name} has no preset '{preset}'; {hint}(presets: {', '.join(known)})")
  try:
    config = module.get_config(preset)
  except UserError as error:
    raise UserError(f"{name}: {error}") from error
  except Exception as error:
    raise UserError(failure_of(error, path)) from error
  if not isinstance(config, ConfigDict):
    got = type(config).__name__
    raise UserError(f"{name}: get_config must return an ml_collections.ConfigDict (got {got})")
  with config.unlocked():
    config.preset = preset
  return module, config.lock()


def _override(config: ConfigDict, path: str, text: str) -> None:
  *sections, key = path.split(".")
  section = config
  for name in sections:
    section = section.get(name) if isinstance(section, ConfigDict) else None
  if not isinstance(section, ConfigDict) or key not in section:
    near = _nearest(path, [leaf for leaf, _ in leaves(config)])
    hint = f"did you mean '{near}'?" if near else "--help lists the fields"
    raise UserError(f"unknown config field '{path}'; {hint}")
  old = section[key]
  if isinstance(old, ConfigDict):
    first = next(iter(old), "field")
    raise UserError(
      f"'{path}' is a section; set one of its fields, e.g. --config.{path}.{first}=..."
    )
  if path == "preset":
    raise UserError(f"choose the preset with the file: --config=FILE:{text}")
  section[key] = _parse(path, text, old, section.get_type(key))


def _nearest(path: str, known: Iterable[str]) -> str | None:
  """Finds the path most like `path`: as a whole, by its last name, or by initials."""
  last = path.rpartition(".")[2]

  def score(candidate: str) -> tuple[float, float]:
    name = candidate.rpartition(".")[2]
    whole = difflib.SequenceMatcher(None, path, candidate).ratio()
    part = difflib.SequenceMatcher(None, last, name).ratio()
    abbreviates = name == _initials(last) or last == _initials(name)
    return max(whole, part, float(abbreviates)), whole

  best = max(known, key=score, default=None)
  return best if best is not None and score(best)[0] >= 0.6 else None


def _initials(name: str) -> str:
  words = re.split("[_-]", name)
  return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _parse(path: str, text: str, old: Any, kind: type) -> Any:
  """Parses `text` as a field of type `kind` whose value is `old`."""
  if old is None and text.lower() == "none":
    return None
  if kind is str:
    return text
  if kind is bool and text.lower() in _BOOLS:
    return _BOOLS[text.lower()]
  try:
    if kind is int:
      return int(text)
    if kind is float and not math.isnan(number := float(text)):
      return number
    if kind in (tuple, list):
      return kind(_elements(ast.literal_eval(text), old))
  except (ValueError, TypeError, SyntaxError):
    pass
  article, inner = "an" if kind is int else "a", ""
  if kind in (tuple, list) and old:
    names = dict.fromkeys(type(element).__name__ for element in old)
    inner = f" of {' or '.join(names)}, e.g. {old!r} or {kind(old[:1])!r}"
  raise UserError(f"'{path}' takes {article} {kind.__name__}{inner}, got {text!r}")


def _elements(values: Any, old: tuple | list | None) -> list[Any]:
  """Checks that each value has a type that the default's elements have."""
  if not isinstance(values, tuple | list):
    raise TypeError
  kinds = {type(element) for element in old or ()}
  checked = []
  for value in values:
    if float in kinds and type(value) is int and int not in kinds:
      checked.append(float(value))
    elif not kinds or type(value) in kinds:
      checked.append(value)
    else:
      raise TypeError
  return checked


def _print_help(
  flags: Mapping[str, str], module: ModuleType | None, config: ConfigDict | None
) -> NoReturn:
  print("usage: --config=FILE[:PRESET] [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]")
  print("\nflags:")
  lines = {
    "config": "a Python file with get_config(preset), or the name of one in the package",
    **flags,
  }
  lines["help"] = "print this and exit"
  for name, meaning in lines.items():
    print(f"  --{name:<14} {meaning}")
  if module is None or config is None:
    print("\nwith --config, --help also lists the fields of that config")
    raise SystemExit(0)
  if presets := getattr(module, "PRESETS", None):
    print(f"\npresets: {', '.join(presets)} (shown: {config.preset})")
  comments = _comments(module)
  print("\nfields:")
  for path, value in leaves(config):
    field = f"--config.{path}={value}"
    print(f"  {field:<46} {comments.get(path, '')}".rstrip())
  raise SystemExit(0)


def _comments(module: ModuleType) -> dict[str, str]:
  """Maps fields to the comment at the end of the line that sets them first.

  Includes modules that the file imports from this package or from its own directory; of a
  package, all its files.
  """
  main = Path(str(module.__file__)).resolve()
  homes = [sys.modules.get(_home(value)) for value in vars(module).values()]
  files = [Path(getattr(home, "__file__", None) or "").resolve() for home in homes]
  places = (main.parent, Path(__file__).resolve().parent)
  found: dict[str, str] = {}
  modules = {f: f.parent if f.name == "__init__.py" else f for f in files}
  inside = [file for file, module in modules.items() if module.parent in places]
  parts = [
    part for f in inside if f.name == "__init__.py" for part in sorted(f.parent.glob("*.py"))
  ]
  for file in [main, *inside, *parts]:
    source = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
      token.start[0]: token.string.lstrip("# ")
      for token in tokens
      if token.type == tokenize.COMMENT
    }
    for path, line in _settings(ast.parse(source), ""):
      if line in by_line:
        found.setdefault(path, by_line[line])
  return found


def _home(value: Any) -> str:
  """Returns the name of the module that a global is, or comes from."""
  return value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")


def _settings(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
  """Yields (dotted path, line) of what a config file sets, in the file's order."""
  match node:
    case ast.Assign(targets=[ast.Attribute() as target]):
      path = ast.unparse(target).partition(".")[2]
      yield path, node.end_lineno or 0
      yield from _settings(node.value, f"{path}.")
    case ast.Call(keywords=[_, *_]):
      for keyword in node.keywords:
        yield f"{prefix}{keyword.arg}", keyword.end_lineno or 0
        yield from _settings(keyword.value, f"{prefix}{keyword.arg}.")
    case _:
      for child in ast.iter_child_nodes(node):
        yield from _settings(child, prefix)
