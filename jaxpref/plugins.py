"""Lookup of the modules that users name in a configuration: losses, scorers, data sources.

A plugin of another package is checked where it is used: its author's mistakes are one line.
"""

import contextlib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

from jaxpref.errors import UserError, failure_of

_OWN = "jaxpref."  # the modules of this package
_RESERVED = "base"  # the module that defines the interface of a package's plugins


def find_module(package: str, name: str) -> ModuleType | None:
  """Imports a plugin by its name; returns None if no module has it.

  A name is a file of `package`, the name of an entry point in the group `package` (how another
  package registers its plugins), or an importable module.

  Args:
    package: the package with the plugins of one kind, such as 'jaxpref.losses'.
    name: the plugin's name.

  Raises:
    UserError: the module exists and cannot be imported, or a registered one does not exist.
  """
  registered = [entry.module for entry in metadata.entry_points(group=package, name=name)]
  # The package's own modules come first, so that another package cannot change a recipe.
  for full in (f"{package}.{name}", *registered, name):
    reserved = full.endswith(f".{_RESERVED}")
    if reserved or not all(part.isidentifier() for part in full.split(".")):
      continue
    try:
      return importlib.import_module(full)
    except UserError:
      raise
    except Exception as error:
      missing = error.name if isinstance(error, ModuleNotFoundError) else None
      if missing and (full == missing or full.startswith(f"{missing}.")):
        continue
      raise UserError(
        f"module {full!r} cannot be imported: {failure_of(error, _imported_file(error))}"
      ) from error
  if registered:
    raise UserError(
      f"the entry point {name!r} of {package} names the module {registered[0]!r}, which does "
      "not exist"
    )
  return None


def _imported_file(error: Exception) -> str | None:
  """Returns the file of the module whose import has raised, if its code has begun to run."""
  frames = traceback.extract_tb(error.__traceback__)
  return next((frame.filename for frame in frames if frame.name == "<module>"), None)


def check_function(
  what: str, function: Any, arguments: Sequence[str], keywords: Sequence[str] = ()
) -> None:
  """Refuses a plugin's function that cannot be called as it will be.

  Args:
    what: names the function, as in "loss 'x': objective".
    function: the function.
    arguments: names of the positional arguments.
    keywords: names of the arguments given by name.

  Raises:
    UserError: it is not a function, or its parameters are others.
  """
  call = ", ".join((*arguments, *(f"{name}=..." for name in keywords)))
  if not callable(function):
    raise UserError(f"{what} must be a function of ({call}) (got {function!r})")
  try:
    signature = inspect.signature(function)
  except ValueError:  # some functions in C do not tell
    return
  try:
    signature.bind(*arguments, **dict.fromkeys(keywords))
  except TypeError as error:
    raise UserError(
      f"{what} is called with ({call}), and its parameters are {signature}: {error}"
    ) from error


@contextlib.contextmanager
def one_line_errors(what: str, function: Callable, *, own: bool = False) -> Iterator[None]:
  """Turns an exception of a plugin's function into a `UserError` that names file and line.

  Errors of files and `UserError` pass unchanged.

  Args:
    what: names the function, as in "loss 'x': objective".
    function: the function that is called.
    own: whether functions of this package are treated in the same way. If not, their
      exceptions keep their traceback, because they are bugs of this package.

  Raises:
    UserError: the function has raised another exception.
  """
  try:
    yield
  except (UserError, OSError):
    raise
  except Exception as error:
    # The function of a `functools.partial` is in `func`.
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    if module.startswith(_OWN) and not own:
      raise
    file = getattr(sys.modules.get(module), "__file__", None)
    raise UserError(f"{what}: {failure_of(error, file)}") from error


def own_names(package: str) -> list[str]:
  """Returns the names of the package's own plugins, sorted."""
  places = importlib.import_module(package).__path__
  return sorted(m.name for m in pkgutil.iter_modules(places) if m.name != _RESERVED)


def registered_names(package: str) -> list[str]:
  """Returns the names of the plugins that other packages have registered, sorted."""
  return sorted(metadata.entry_points(group=package).names)
