"""Scorers rate images for their prompts; one module per family, one interface.

A family is a module with

    SCORERS: dict[str, tuple[str, Scorer]]  # name -> (version, function)

A function takes images (uint8 [N, H, W, 3]) and their N prompts and returns float scores [N];
higher is better. The version must change whenever the scores do, so that numbers of different
versions are never compared. Importing a family must be cheap: a function loads its weights
when it is first called.

A family may also have

    category(prompt: str) -> str

which returns the prompt's category, by which the report groups scores. It raises a `UserError`
for a prompt that the family cannot judge. Without it, a family judges any prompt.

A scorer's name is "<family>.<name>", where the family is a file of this package, the name of
an entry point in the group `jaxpref.scorers` (how another package registers its families), or
an importable module.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxpref import plugins
from jaxpref.errors import UserError

Scorer = Callable[[np.ndarray, Sequence[str]], np.ndarray]
UNCATEGORIZED = "prompts"


def load_scorers(names: Iterable[str]) -> dict[str, tuple[str, Scorer]]:
  """Loads scorers, as name -> (version, function), in the order of `names`.

  Args:
    names: "<family>.<name>" each, such as "shapes.correct".

  Raises:
    UserError: a name is unknown; the message lists the known names.
  """
  return {name: _load(name) for name in names}


def score(
  name: str, function: Scorer, images: np.ndarray, prompts: Sequence[str]
) -> np.ndarray:
  """Scores images.

  Args:
    name: of the scorer, for error messages.
    function: from `load_scorers`.
    images: uint8 [N, H, W, 3].
    prompts: of the images, N.

  Returns:
    float64 [N].

  Raises:
    UserError: the scorer does not return N finite numbers.
  """
  found = np.asarray(function(images, prompts), float)
  if found.shape != (len(images),):
    raise UserError(
      f"scorer {name!r} must return one number for each of {len(images)} images (got an array "
      f"of shape {found.shape})"
    )
  if not np.isfinite(found).all():
    bad = int(np.flatnonzero(~np.isfinite(found))[0])
    raise UserError(f"scorer {name!r} gives {found[bad]} for the prompt {prompts[bad]!r}")
  return found


def categorize(names: Iterable[str], prompts: Sequence[str]) -> list[str]:
  """Returns the category of each prompt, by the first scorer whose family has categories.

  If no family has any, all prompts are in the category `UNCATEGORIZED`.

  Raises:
    UserError: that family cannot judge one of the prompts.
  """
  families = (plugins.find_module(__name__, name.rpartition(".")[0]) for name in names)
  category = next((f.category for f in families if f and hasattr(f, "category")), None)
  return [category(prompt) if category else UNCATEGORIZED for prompt in prompts]


def _load(name: str) -> tuple[str, Scorer]:
  family, _, short = name.rpartition(".")
  scorers = _scorers_of(family)
  if short not in scorers:
    own = [f"{f}.{n}" for f in plugins.own_names(__name__) for n in _scorers_of(f)]
    registered = [f"{f}.*" for f in plugins.registered_names(__name__)]
    raise UserError(
      f"unknown scorer {name!r}; known are {', '.join((*own, *registered))}, and MODULE.NAME "
      "of an importable module with SCORERS"
    )
  match scorers[short]:
    case (str(), function) if callable(function):
      return scorers[short]
  raise UserError(f"scorer {name!r}: its entry in SCORERS must be (version, function)")


def _scorers_of(family: str) -> dict[str, tuple[str, Scorer]]:
  return getattr(plugins.find_module(__name__, family), "SCORERS", {})
