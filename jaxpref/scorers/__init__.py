"""Scorers rate images for their prompts; one module a family, one interface.

A family is a module `jaxpref.scorers.<family>` with

    SCORERS: dict[str, tuple[str, Scorer]]  # name -> (version, function)

where a function takes images (uint8 [N, H, W, 3]) and their N prompts and returns float
scores [N], higher being better. A version changes whenever scores do, so that numbers of
different versions are never compared. Importing a family is cheap: weights are loaded
when first needed. A new family is a new module; there is no list to add it to.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxpref.errors import UserError

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]


def load_scorers(names: Iterable[str]) -> dict[str, tuple[str, Scorer]]:
  """The scorers of these names, as name -> (version, function), in this order.

  Args:
    names: "<family>.<name>" each, such as "shapes.correct".

  Raises:
    UserError: a name is unknown; the known ones are said.
  """
  return {name: _load(name) for name in names}


def _load(name: str) -> tuple[str, Scorer]:
  family, _, short = name.partition(".")
  scorers = _family(family) if family in _families() else {}
  if short not in scorers:
    known = [f"{f}.{n}" for f in _families() for n in _family(f)]
    raise UserError(f"unknown scorer {name!r}; known are {', '.join(known)}")
  return scorers[short]


def _families() -> list[str]:
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _family(family: str) -> dict[str, tuple[str, Scorer]]:
  return importlib.import_module(f"{__name__}.{family}").SCORERS
