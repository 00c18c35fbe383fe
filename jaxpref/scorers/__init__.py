"""Scorers rate images for their prompts; one module per family, one interface.

A family is a module with

    SCORERS: dict[str, tuple[str, Scorer]]  # name -> (version, function)

A function takes N images and their N prompts and returns float scores [N]; higher is better.
The images are an array (uint8 [N, H, W, 3]) or, if their sizes differ, a sequence of arrays
(uint8 [H, W, 3]). The version must change whenever the scores do, so that numbers of different
versions are never compared; a neural scorer's version names the preprocessing of images.
Importing a family must be cheap: a function loads its weights when it is first called.

A family may also have

    category(prompt: str) -> str

which returns the prompt's category, by which the report groups scores. It raises a `UserError`
for a prompt that the family cannot judge. Without it, a family judges any prompt.

A family of differentiable scorers has

    REWARDS: dict[str, Callable[[str], Reward]]  # name -> (dtype) -> Reward

A family whose scorers need files, such as weights, may have

    FILES: dict[str, Callable[[], None]]  # name -> finds them, or raises a UserError

so that a missing file is found before hours of work. Scorers with the same function are
variants of one network.

A family whose models see images may have

    FEATURES: dict[str, Callable[[Images], np.ndarray]]  # name -> images -> float32 [N, D]

by which diversity is measured.

A scorer's name is "<family>.<name>", where the family is a file of this package, the name of
an entry point in the group `jaxpref.scorers` (how another package registers its families), or
an importable module.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref import plugins
from jaxpref.errors import UserError

Images = np.ndarray | Sequence[np.ndarray]
Scorer = Callable[[Images, Sequence[str]], np.ndarray]
Entry = tuple[str, Scorer]  # version and function
UNCATEGORIZED = "prompts"


class Reward(NamedTuple):
  """A scorer that can be part of a jitted program.

  Attributes:
    params: its parameters, as numpy arrays.
    tokenize: (prompts) -> tokens, a tree of numpy arrays [N, ...].
    score: (params, images, tokens) -> float32 [N], for images float [N, H, W, 3] in [0, 1];
      differentiable in the images, and for `step_reward` in the parameters. Images are resized
      in the program, with antialiasing and without rounding, which differs a little from the
      resizing of an 8-bit image.
  """

  params: Any
  tokenize: Callable[[Sequence[str]], Any]
  score: Callable[[Any, Any, Any], Any]


def load_scorers(names: Iterable[str]) -> dict[str, Entry]:
  """Loads scorers, as name -> (version, function), in the order of `names`.

  Args:
    names: "<family>.<name>" each, such as "shapes.correct".

  Raises:
    UserError: a name is unknown; the message lists the known names.
  """
  return {name: _load(name) for name in names}


def find_files(names: Iterable[str]) -> None:
  """Finds the files of scorers before they are needed; downloads those that it can.

  Args:
    names: "<family>.<name>" each.

  Raises:
    UserError: a file is missing; says which, and where to get it.
  """
  for name in names:
    family, _, short = name.rpartition(".")
    if find := _entries(family, "FILES").get(short):
      with plugins.one_line_errors(f"scorer {name!r}: its entry in FILES", find):
        find()


def with_weights_of(names: Iterable[str], others: Iterable[str]) -> list[str]:
  """Returns those scorers that are among the others, or have the files of one.

  Args:
    names: "<family>.<name>" each.
    others: names, or keys "<family>.<name>-<version>".
  """

  def identity(name: str) -> Any:
    name = name.partition("-")[0]
    family, _, short = name.rpartition(".")
    return _entries(family, "FILES").get(short, name)

  known = [identity(other) for other in others]
  return [name for name in names if identity(name) in known]


def load_reward(name: str, *, dtype: str = "float32") -> Reward:
  """Loads a differentiable scorer.

  Args:
    name: "<family>.<name>", such as "pickscore.v1".
    dtype: of the weights and the computation, 'float32' or 'bfloat16'.

  Raises:
    UserError: the name is unknown, or its weights are missing; says which, or where they are.
  """
  family, _, short = name.rpartition(".")
  rewards = _entries(family, "REWARDS")
  if short not in rewards:
    known = [f"{f}.{n}" for f in plugins.own_names(__name__) for n in _entries(f, "REWARDS")]
    raise UserError(
      f"{name!r} is not a differentiable scorer; known are {', '.join(known)}, and MODULE.NAME "
      "of an importable module with REWARDS"
    )
  what, load = f"scorer {name!r}: its entry in REWARDS", rewards[short]
  plugins.check_function(what, load, ("dtype",))
  with plugins.one_line_errors(what, load):
    reward = load(dtype)
  if not isinstance(reward, Reward):
    raise UserError(
      f"{what} must return a jaxpref.scorers.Reward (got {type(reward).__name__})"
    )
  return reward


def load_features(name: str) -> Callable[[Images], np.ndarray]:
  """Loads a function of images, uint8 [H, W, 3] each, to features, float32 [N, D].

  Args:
    name: "<family>.<name>", such as "clip.l14".

  Raises:
    UserError: no family has features of this name. The function raises it if it does not
      return an array [N, D] for N images.
  """
  family, _, short = name.rpartition(".")
  features = _entries(family, "FEATURES")
  if short not in features:
    known = [f"{f}.{n}" for f in plugins.own_names(__name__) for n in _entries(f, "FEATURES")]
    raise UserError(f"{name!r} is not a name of features; known are {', '.join(known)}")
  what, function = f"features {name!r}", features[short]
  plugins.check_function(what, function, ("images",))

  def checked(images: Images) -> np.ndarray:
    with plugins.one_line_errors(what, function):
      found = function(images)
    if np.ndim(found) != 2 or len(found) != len(images):
      shape = f"shape {np.shape(found)}"
      raise UserError(f"{what} must be an array [N, D] for {len(images)} images (got {shape})")
    return found

  return checked


def score(name: str, function: Scorer, images: Images, prompts: Sequence[str]) -> np.ndarray:
  """Scores images, and refuses scores that are not finite.

  The arguments and the result are those of `call`.

  Raises:
    UserError: a score is not finite, or see `call`.
  """
  found = call(name, function, images, prompts)
  if not np.isfinite(found).all():
    bad = int(np.flatnonzero(~np.isfinite(found))[0])
    raise UserError(f"scorer {name!r} gives {found[bad]} for the prompt {prompts[bad]!r}")
  return found


def call(name: str, function: Scorer, images: Images, prompts: Sequence[str]) -> np.ndarray:
  """Scores images.

  Args:
    name: of the scorer, for error messages.
    function: from `load_scorers`.
    images: uint8 [N, H, W, 3], or N images of different sizes.
    prompts: of the images, N.

  Returns:
    float64 [N].

  Raises:
    UserError: the scorer does not return N numbers, or a scorer of another package raises an
      exception.
  """
  what = f"scorer {name!r}"
  with plugins.one_line_errors(what, function):
    returned = function(images, prompts)
  must = f"{what} must return one number for each of {len(images)} images"
  try:
    found = np.asarray(returned, float)
  except (TypeError, ValueError) as error:
    raise UserError(f"{must} (got {returned!r})") from error
  if found.shape != (len(images),):
    raise UserError(f"{must} (got an array of shape {found.shape})")
  return found


def categorize(names: Iterable[str], prompts: Sequence[str]) -> list[str]:
  """Returns the category of each prompt, by the first scorer whose family has categories.

  If no family has any, all prompts are in the category `UNCATEGORIZED`.

  Raises:
    UserError: that family cannot judge one of the prompts.
  """
  families = (plugins.find_module(__name__, name.rpartition(".")[0]) for name in names)
  category = next((f.category for f in families if f and hasattr(f, "category")), None)
  if category is None:
    return [UNCATEGORIZED] * len(prompts)
  what = f"{category.__module__}.category"
  with plugins.one_line_errors(what, category):
    found = [category(prompt) for prompt in prompts]
  for prompt, name in zip(prompts, found, strict=True):
    if not isinstance(name, str):
      raise UserError(f"{what} must return a text (got {name!r} for {prompt!r})")
  return found


def _load(name: str) -> Entry:
  family, _, short = name.rpartition(".")
  scorers = _entries(family, "SCORERS")
  if short not in scorers:
    own = [f"{f}.{n}" for f in plugins.own_names(__name__) for n in _entries(f, "SCORERS")]
    registered = [f"{f}.*" for f in plugins.registered_names(__name__)]
    has = ""
    if family and plugins.find_module(__name__, family):
      has = f" ({family} has {', '.join(sorted(scorers)) or 'no SCORERS'})"
    raise UserError(
      f"unknown scorer {name!r}{has}; known are {', '.join((*own, *registered))}, and "
      "MODULE.NAME of an importable module with SCORERS"
    )
  match scorers[short]:
    case (str(), function) if callable(function):
      plugins.check_function(f"scorer {name!r}", function, ("images", "prompts"))
      return scorers[short]
  raise UserError(
    f"scorer {name!r}: its entry in SCORERS must be (version, function), the version a string "
    f"(got {scorers[short]!r})"
  )


def _entries(family: str, kind: str) -> dict[str, Any]:
  found = getattr(plugins.find_module(__name__, family), kind, {})
  if not isinstance(found, dict):
    raise UserError(f"{kind} of {family} must be a dict (got {type(found).__name__})")
  return found
