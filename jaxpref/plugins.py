"""Lookup of the modules that users name in a configuration: losses, scorers, data sources."""

import importlib
import pkgutil
from importlib import metadata
from types import ModuleType

_RESERVED = "base"  # the module that defines the interface of a package's plugins


def find_module(package: str, name: str) -> ModuleType | None:
  """Imports a plugin by its name; returns None if no module has it.

  A name is a file of `package`, the name of an entry point in the group `package` (how another
  package registers its plugins), or an importable module.

  Args:
    package: the package with the plugins of one kind, such as 'jaxpref.losses'.
    name: the plugin's name.
  """
  registered = metadata.entry_points(group=package, name=name)
  # The package's own modules come first, so that another package cannot change a recipe.
  for full in (f"{package}.{name}", *(e.module for e in registered), name):
    reserved = full.endswith(f".{_RESERVED}")
    if reserved or not all(part.isidentifier() for part in full.split(".")):
      continue
    try:
      return importlib.import_module(full)
    except ModuleNotFoundError as error:
      if error.name != full and not full.startswith(f"{error.name}."):
        raise  # the module exists, and one of its own imports does not
  return None


def own_names(package: str) -> list[str]:
  """Returns the names of the package's own plugins, sorted."""
  places = importlib.import_module(package).__path__
  return sorted(m.name for m in pkgutil.iter_modules(places) if m.name != _RESERVED)


def registered_names(package: str) -> list[str]:
  """Returns the names of the plugins that other packages have registered, sorted."""
  return sorted(metadata.entry_points(group=package).names)
