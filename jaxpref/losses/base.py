"""What a loss module says of itself, and how a run finds it.

A method is a module with two names, and perhaps a third:

  NEEDS: a `Needs`, what a training step must feed it.
  objective(terms, *, ...) -> (loss [B], metrics): from a micro-batch's `Terms`; metrics are
    per-sample arrays or scalars, averaged by the caller.
  arrange(x0, cond, uncond, key, *, ...) -> Arranged: what becomes of a batch before it is
    noised, inside the step; without it images are trained on as the rows have them.

Keyword-only parameters of either are hyper-parameters: the configuration's fields of these
names under `loss`, which must be there unless the parameter has a default.

`config.loss.name` is a file of this package, the name of an entry point in the group
`jaxpref.losses` (how another package registers its own), or a module that Python finds.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxpref.errors import UserError

GROUP = "jaxpref.losses"
_NOT_HYPER = ("name", "reference")  # fields of the section that are for the training step
_HERE = "base"


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a training step must feed a loss.

  Attributes:
    rows: what a row of the data is, and so the arms of the errors:
      'experts': an image ('e'),
      'pairs': a preferred image ('w') and the other ('l'),
      'singles': an image ('x') and whether it is `desirable`,
      'lists': `data.list_size` images from best to worst ('1', '2', ...).
    rollout: what the policy draws for each row besides, the arm 'p': 'states' of its way
      from noise to image, with its own predictions there as targets, or None.
    reference: whether the errors of a frozen reference are needed besides the policy's; whose
      they are, the configuration's `loss.reference` says.
    shared_noise: whether images of a row get the same noise; the timestep they always share.
    residuals: whether `objective` is given predictions minus targets, [B, C, h, w], in the
      place of their mean squares.
    condition: 'image' if the denoiser is also shown a clean image, which `arrange` chooses:
      its input is widened then.
    arms: of the errors, where `arrange` makes others than the rows have.
  """

  rows: Literal["experts", "pairs", "singles", "lists"]
  rollout: Literal["states"] | None = None
  reference: bool = False
  shared_noise: bool = True
  residuals: bool = False
  condition: Literal["image"] | None = None
  arms: tuple[str, ...] = ()


class Arranged(NamedTuple):
  """What `arrange` makes of a batch.

  Attributes:
    x0: images to be noised, latents [B, A, C, h, w].
    cond: what the denoiser is told, a tree of [B, ...].
    image: the clean image it is shown, [B, C, h, w], or None.
    labels: further columns, [B].
  """

  x0: jax.Array
  cond: Any
  image: jax.Array | None
  labels: dict[str, jax.Array]


class Terms(NamedTuple):
  """What `objective` sees of a micro-batch.

  Attributes:
    err: the policy's errors by arm, float32 [B]; or residuals, see `Needs.residuals`.
    ref: the reference's, without gradient; empty where there is none.
    labels: further columns of the rows, [B].
    mean: the mean of an array over the micro-batch of all devices, a scalar.
  """

  err: Mapping[str, jax.Array]
  ref: Mapping[str, jax.Array]
  labels: Mapping[str, jax.Array]
  mean: Callable[[jax.Array], jax.Array]


def to_errors(residuals: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Denoising errors [B] of residuals [B, ...], by arm: means of squares."""
  return {
    arm: jnp.mean(jnp.square(r), axis=tuple(range(1, r.ndim))) for arm, r in residuals.items()
  }


def load_loss(name: str) -> ModuleType:
  """The module of a method.

  Raises:
    UserError: there is none of that name, or it is no loss module.
  """
  module = _import(name)
  lacking = [n for n in ("NEEDS", "objective") if not hasattr(module, n)]
  if lacking:
    raise UserError(f"loss {name!r} is no loss module: it lacks {', '.join(lacking)}")
  if not isinstance(module.NEEDS, Needs):
    raise UserError(f"loss {name!r} is no loss module: its NEEDS is no jaxpref.losses.Needs")
  return module


def known_losses() -> list[str]:
  """Names of this package's losses and of those that other packages have registered."""
  ours = [m.name for m in pkgutil.iter_modules(_package().__path__) if m.name != _HERE]
  return sorted({*ours, *metadata.entry_points(group=GROUP).names})


def hyper_of(module: ModuleType, settings: Mapping[str, Any]) -> dict[str, Any]:
  """A loss's hyper-parameters out of the configuration's `loss` section.

  Raises:
    UserError: the section lacks one, or has one that the loss does not take.
  """
  takes = _takes(module.objective)
  if hasattr(module, "arrange"):
    takes |= _takes(module.arrange)
  if lacking := [f"'loss.{n}'" for n, must in takes.items() if must and n not in settings]:
    raise UserError(f"loss {settings['name']!r} needs {', '.join(lacking)} in its config file")
  if foreign := [f"'loss.{n}'" for n in settings if n not in (*takes, *_NOT_HYPER)]:
    raise UserError(f"loss {settings['name']!r} makes nothing of {', '.join(foreign)}")
  return {name: settings[name] for name in takes if name in settings}


def bind(function: Callable, hyper: Mapping[str, Any]) -> Callable:
  """`objective` or `arrange` with those hyper-parameters that it takes."""
  taken = {name: hyper[name] for name in _takes(function) if name in hyper}
  return functools.partial(function, **taken)


def _takes(function: Callable) -> dict[str, bool]:
  """A function's keyword-only parameters, and whether each must be given."""
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_objective(
  module: ModuleType, hyper: Mapping[str, Any], arms: Sequence[str], *, images: int
) -> None:
  """Traces a loss on nothing: what it refuses, it refuses before anything is written.

  Args:
    module: of the loss.
    hyper: its hyper-parameters.
    arms: of its errors.
    images: of a row.

  Raises:
    UserError: a hyper-parameter is not one of those it knows.
  """
  shape = (2, 1, 1, 1) if module.NEEDS.residuals else (2,)
  values = {arm: jnp.zeros(shape) for arm in arms}
  labels = {"desirable": jnp.zeros(2, bool)} if module.NEEDS.rows == "singles" else {}
  if hasattr(module, "arrange"):
    x0, cond = jnp.zeros((2, images, 1, 1, 1)), {"text": jnp.zeros((2, 1, 1))}
    arranged = bind(module.arrange, hyper)(x0, cond, cond, jax.random.key(0))
    labels |= arranged.labels
  objective = bind(module.objective, hyper)
  ref = values if module.NEEDS.reference else {}
  jax.eval_shape(
    lambda err, ref, labels: objective(Terms(err, ref, labels, jnp.mean)),
    *(values, ref, labels),
  )


def _package() -> ModuleType:
  return importlib.import_module(__package__)


def _import(name: str) -> ModuleType:
  registered = metadata.entry_points(group=GROUP, name=name)
  # Ours first: what is installed besides changes no published recipe.
  for full in (f"{__package__}.{name}", *(e.module for e in registered), name):
    if not all(part.isidentifier() for part in full.split(".")) or full.endswith(f".{_HERE}"):
      continue
    try:
      return importlib.import_module(full)
    except ModuleNotFoundError as error:
      if error.name != full and not full.startswith(f"{error.name}."):
        raise  # the module is there, something that it imports is not
  known = ", ".join(known_losses())
  raise UserError(f"no loss {name!r}; there are {known}, or a module that Python finds")
