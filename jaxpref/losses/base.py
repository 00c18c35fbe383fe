"""The interface of a loss module, and how losses are looked up.

A method is a module with two names, and perhaps some of the others:

  NEEDS: a `Needs`, the inputs that the train step must provide.
  objective(terms, *, ...) -> (loss [B], metrics): from a micro-batch's `Terms`. Metrics are
    per-sample arrays or scalars, which the caller averages.
  arrange(x0, cond, uncond, key, *, ...) -> Arranged: rearranges a batch before it is noised,
    inside the step. Without it, the step trains on the images as the rows have them.
  label(rewards [N], *, ...) -> dict of [N]: makes further labels of a round's scored rows from
    their rewards, in numpy, once for each round.
  refine(needs, updates, *, ...) -> Needs: what hyper-parameters, and the number of updates on a
    round's samples, change of `NEEDS`.

Keyword-only parameters of these are hyper-parameters. They come from the fields of the same
name in the configuration's `loss` section, which must be there unless the parameter has a
default.

`config.loss.name` is a file of this package, the name of an entry point in the group
`jaxpref.losses` (how another package registers its losses), or an importable module.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import base_config, plugins
from jaxpref.errors import UserError

GROUP = "jaxpref.losses"
# The functions of a loss module with their positional arguments.
_ARGUMENTS = {
  "objective": ("terms",),
  "arrange": ("x0", "cond", "uncond", "key"),
  "label": ("rewards",),
  "refine": ("needs", "updates"),
}


@dataclasses.dataclass(frozen=True)
class Needs:
  """The inputs that the train step must provide to a loss.

  Attributes:
    rows: the kind of a data row, which names the arms of the errors:
      'experts': one image ('e'),
      'pairs': a preferred image ('w') and the other one ('l'),
      'singles': one image ('x') and whether it is `desirable`,
      'lists': `data.list_size` images from best to worst ('1', '2', ...),
      'scored': one sample of the policy ('x') with its `advantage` and `reward`,
      'steps': one step of the policy's sampler ('x'), whose error is the difference of the
        step's output and its mean, with `advantage`, `reward`, and `std`, `gain` and `length`
        of `jaxpref.training.step_rows`,
      'step_pairs': two steps of a prompt's images, the better one first ('w', 'l'): the same
        step of two trajectories, with the labels of 'steps' [B, 2], or two steps from one
        state, whose labels of the step are [B, 1], or of two candidates that have gone on alone
        from one state, [B, 2],
      'paths': two trajectories of a prompt's samples ('a', 'b'): instead of errors, the
        log-ratios of policy and reference in each step, [S, B], with labels [B, 2],
      'groups': all samples of a prompt ('1', '2', ...), with the same labels [B, G],
      'prompts': no image; the label `reward` of a sample that is made inside of the update,
        through which the gradient goes.
    rollout: 'states' adds the arm 'p': states of the policy's own sampling trajectories, with
      its predictions there as targets. None adds nothing.
    reference: whether the loss needs the errors of a frozen reference, which is chosen by the
      configuration's `loss.reference`.
    old: whether the loss needs the errors of a copy of the policy that lags behind it, which
      follows the policy as `rounds.old_*` say.
    shared_noise: whether the images of a row get the same noise. They always share the
      timestep.
    residuals: whether `objective` gets predictions minus targets, [B, C, h, w], instead of
      their mean squares.
    judges: whether a reward model is trained, see `reward_model` and `step_reward` in
      `jaxpref.models`: instead of errors, `objective` gets its rewards of the noised images or
      of those predicted from them, [B].
    condition: 'image' if the denoiser has a clean image as a further input, which `arrange`
      chooses. The denoiser's input is widened for it.
    arms: names of the errors, if `arrange` changes those of the rows.
  """

  rows: Literal[
    "experts",
    "pairs",
    "singles",
    "lists",
    "scored",
    "steps",
    "step_pairs",
    "paths",
    "groups",
    "prompts",
  ]
  rollout: Literal["states"] | None = None
  reference: bool = False
  old: bool = False
  shared_noise: bool = True
  residuals: bool = False
  judges: bool = False
  condition: Literal["image"] | None = None
  arms: tuple[str, ...] = ()

  def __post_init__(self):
    """Checks the values of the fields.

    Raises:
      UserError: a field has another value than those above.
    """
    choices = {
      "rows": get_args(Needs.__annotations__["rows"]),
      "rollout": (None, "states"),
      "condition": (None, "image"),
      **dict.fromkeys(
        ("reference", "old", "shared_noise", "residuals", "judges"), (False, True)
      ),
    }
    for field, values in choices.items():
      if (given := getattr(self, field)) not in values:
        one_of = " or ".join(str(value) for value in values)
        if len(values) > 2:
          one_of = f"one of {', '.join(values)}"
        raise UserError(f"Needs: {field} must be {one_of} (got {given!r})")
    others = self.reference, self.old, self.residuals, self.rollout, self.condition, self.arms
    if self.judges and (self.rows != "pairs" or any(others)):
      raise UserError(
        "Needs: with judges=True, rows must be 'pairs', and reference, old, residuals, "
        "rollout, condition and arms cannot be set"
      )
    if not (isinstance(self.arms, tuple) and all(isinstance(arm, str) for arm in self.arms)):
      raise UserError(f"Needs: arms must be a tuple of names (got {self.arms!r})")

  @property
  def of_steps(self) -> bool:
    """Whether rows are steps of the policy's own sampler."""
    return self.rows in ("steps", "step_pairs", "paths")

  @property
  def scored(self) -> bool:
    """Whether rows have the reward and the advantage of each of their samples."""
    return self.of_steps or self.rows in ("scored", "groups")

  @property
  def several(self) -> bool:
    """Whether a scored row has several samples, and its labels an axis for them."""
    return self.rows in ("groups", "step_pairs", "paths")


class Arranged(NamedTuple):
  """A rearranged batch.

  Attributes:
    x0: clean latents, [B, A, C, h, w].
    cond: conditioning, a tree of [B, ...].
    image: latents of the clean input image, [B, C, h, w], or None.
    labels: further columns, [B].
  """

  x0: jax.Array
  cond: Any
  image: jax.Array | None
  labels: dict[str, jax.Array]


class Terms(NamedTuple):
  """The input of `objective`, for one micro-batch.

  Attributes:
    err: the policy's errors by arm, float32 [B], or residuals (see `Needs.residuals`), or the
      rewards of a reward model (see `Needs.judges`), or the steps' log-ratios of policy and
      reference, [S, B], of rows that are 'paths'.
    ref: the reference's errors, without gradient; empty without a reference, and of 'paths'.
    labels: further columns of the rows, [B].
    mean: averages an array over the micro-batches of all devices, to a scalar.
    old: the same as `err` of the lagging policy, without gradient; empty if the loss does not
      need it.
  """

  err: Mapping[str, jax.Array]
  ref: Mapping[str, jax.Array]
  labels: Mapping[str, jax.Array]
  mean: Callable[[jax.Array], jax.Array]
  old: Mapping[str, jax.Array] = MappingProxyType({})


def to_errors(residuals: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns denoising errors [B] by arm: mean squares of residuals [B, ...]."""
  return {arm: squares(r) for arm, r in residuals.items()}


def squares(x: jax.Array) -> jax.Array:
  """Returns the mean square of each sample, [B], of [B, ...]."""
  return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss with its hyper-parameters bound.

  Attributes:
    name: from the configuration.
    needs: its module's `NEEDS`, as `refine` makes them.
    objective: (terms) -> (loss [B], metrics).
    arrange: (x0, cond, uncond, key) -> `Arranged`, or None.
    label: (rewards) -> further labels of a round's rows, or None.
  """

  name: str
  needs: Needs
  objective: Callable[[Terms], tuple[jax.Array, dict[str, jax.Array]]]
  arrange: Callable[..., Arranged] | None = None
  label: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None


def make_loss(settings: Mapping[str, Any], *, updates: int = 1) -> Loss:
  """Makes a loss from the configuration's `loss` section.

  Args:
    settings: its `name` and its hyper-parameters.
    updates: number of updates on the same samples.

  Raises:
    UserError: no loss has this name, a hyper-parameter is missing or unknown, or `refine` does
      not return a `Needs`.
  """
  name = settings["name"]
  module = load_loss(name)
  functions = [getattr(module, part, None) for part in _ARGUMENTS]
  takes: dict[str, bool] = {}
  for function in filter(None, functions):
    takes |= _takes(function)
  known = f"its hyper-parameters are {', '.join(takes) or '(none)'}"
  for field in settings:
    if field not in (*takes, *base_config.FIELDS_OF_ALL_LOSSES):
      near = difflib.get_close_matches(field, takes, n=1, cutoff=0.75)
      hint = f"; did you mean loss.{near[0]}?" if near else ""
      raise UserError(
        f"loss {name!r} does not take loss.{field} = {settings[field]!r}{hint} ({known}: the "
        "parameters of objective after the *)"
      )
  if lacking := [f"loss.{n}" for n, must in takes.items() if must and n not in settings]:
    raise UserError(f"loss {name!r} needs {', '.join(lacking)} in its config file ({known})")

  def bind(function: Callable) -> Callable:
    taken = {name: settings[name] for name in _takes(function) if name in settings}
    return functools.partial(function, **taken)

  arrange, label, refine = (function and bind(function) for function in functions[1:])
  needs = _refined(name, module.NEEDS, refine, updates) if refine else module.NEEDS
  return Loss(name, needs, bind(module.objective), arrange, label)


def _refined(name: str, needs: Needs, refine: Callable, updates: int) -> Needs:
  """Returns what `refine` makes of the needs; refuses anything else than a `Needs`."""
  what = f"loss {name!r}: refine"
  with plugins.one_line_errors(what, refine, own=True):
    found = refine(needs, updates)
  if not isinstance(found, Needs):
    raise UserError(f"{what} must return a jaxpref.losses.Needs (got {type(found).__name__})")
  return found


def load_loss(name: str) -> ModuleType:
  """Imports the module of a loss.

  Raises:
    UserError: no loss has this name, or its module cannot be imported, lacks a part, or has
      one of another form.
  """
  module = plugins.find_module(GROUP, name)
  if module is None:
    known = ", ".join(known_losses())
    raise UserError(f"unknown loss {name!r}: choose {known}, or name an importable module")
  lacking = [n for n in ("NEEDS", "objective") if not hasattr(module, n)]
  if lacking:
    raise UserError(f"loss {name!r} is not a loss module: it lacks {', '.join(lacking)}")
  if not isinstance(module.NEEDS, Needs):
    raise UserError(
      f"loss {name!r}: NEEDS must be a jaxpref.losses.Needs (got {module.NEEDS!r})"
    )
  for part, arguments in _ARGUMENTS.items():
    if (function := getattr(module, part, None)) is not None:
      keywords = _takes(function) if callable(function) else ()
      plugins.check_function(f"loss {name!r}: {part}", function, arguments, tuple(keywords))
  return module


def known_losses() -> list[str]:
  """Lists the losses of this package and those that other packages have registered."""
  return sorted({*plugins.own_names(GROUP), *plugins.registered_names(GROUP)})


def check_loss(loss: Loss, arms: Sequence[str], *, images: int) -> None:
  """Traces a loss on shapes, so that mistakes show before anything is written.

  Args:
    loss: from `make_loss`.
    arms: names of its errors.
    images: number of images in a row.

  Raises:
    UserError: the loss refuses a hyper-parameter's value, reads what it does not get, returns
      something else than losses [B] and metrics, or raises another exception.
  """
  needs, what = loss.needs, f"loss {loss.name!r}: objective"
  shape: tuple[int, ...] = (2, 1, 1, 1) if needs.residuals else (2,)
  if needs.rows == "paths":
    shape = (3, 2)  # of steps and rows
  err = {arm: jnp.zeros(shape) for arm in arms}
  labels = _example_labels(loss, images)

  def objective(err, labels):
    ref = err if needs.reference else _NotNeeded(f"{what} reads terms.ref", "reference=True")
    old = err if needs.old else _NotNeeded(f"{what} reads terms.old", "old=True")
    return loss.objective(Terms(err, ref, labels, jnp.mean, old))

  with plugins.one_line_errors(what, loss.objective, own=True):
    try:
      found = jax.eval_shape(objective, err, labels)
    except KeyError as error:
      raise UserError(
        f"{what} reads {error}, but its NEEDS (rows={needs.rows!r}, rollout={needs.rollout!r}) "
        f"give it the errors {', '.join(err)} and the labels {', '.join(labels) or '(none)'}"
      ) from error
  _check_result(what, found)


class _NotNeeded(dict):
  """The errors that a loss has not asked for; reading one says how to ask."""

  def __init__(self, reads: str, needed: str):
    super().__init__()
    self._reads, self._needed = reads, needed

  def __missing__(self, arm: Any) -> NoReturn:
    raise UserError(f"{self._reads}[{arm!r}], which needs {self._needed} in NEEDS")


def _example_labels(loss: Loss, images: int) -> dict[str, jax.Array]:
  """Returns labels of two rows, as the objective gets them.

  Raises:
    UserError: `label` or `arrange` raises an exception or returns something else.
  """
  kind = loss.needs.rows
  labels = {"desirable": jnp.zeros(2, bool)} if kind == "singles" else {}
  if loss.needs.scored:
    of_row = jnp.zeros((2, images)) if loss.needs.several else jnp.zeros(2)
    labels = {"advantage": of_row, "reward": of_row}
    if kind in ("steps", "step_pairs"):
      labels |= dict.fromkeys(("std", "gain", "length"), of_row)
    if loss.label:
      what = f"loss {loss.name!r}: label"
      with plugins.one_line_errors(what, loss.label, own=True):
        made = loss.label(np.zeros(of_row.size))
      arrays = made.values() if isinstance(made, Mapping) else [None]
      if any(np.shape(array) != (of_row.size,) for array in arrays):
        raise UserError(f"{what} must return a dict of arrays [N] (got {made!r})")
      labels |= {name: jnp.asarray(array).reshape(of_row.shape) for name, array in made.items()}
  if kind == "prompts":
    labels = {"reward": jnp.zeros(2)}
  if loss.arrange:
    x0, cond = jnp.zeros((2, images, 1, 1, 1)), {"text": jnp.zeros((2, 1, 1))}
    what = f"loss {loss.name!r}: arrange"
    with plugins.one_line_errors(what, loss.arrange, own=True):
      arranged = loss.arrange(x0, cond, cond, jax.random.key(0))
    if not isinstance(arranged, Arranged):
      raise UserError(
        f"{what} must return a jaxpref.losses.Arranged (got {type(arranged).__name__})"
      )
    labels |= arranged.labels
  return labels


def _check_result(what: str, found: Any) -> None:
  """Refuses results of `objective` for B = 2 that are not losses [B] and metrics."""
  if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
    parts = found if isinstance(found, tuple) else [found]
    kinds = ["an array" if hasattr(part, "shape") else type(part).__name__ for part in parts]
    raise UserError(
      f"{what} must return losses and a dict of metrics (got {' and '.join(kinds)})"
    )
  values, metrics = found
  if (shape := getattr(values, "shape", None)) != (2,):
    raise UserError(f"{what} must return losses of shape [B] (got {shape} for B = 2)")
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise UserError(f"{what} must return losses that are floats (got {values.dtype})")
  for key, value in metrics.items():
    if (shape := getattr(value, "shape", None)) not in ((), (2,)):
      raise UserError(
        f"{what}: the metric {key} must be a scalar or of shape [B] (got {shape} for B = 2)"
      )


def _takes(function: Callable) -> dict[str, bool]:
  """Returns a function's keyword-only parameters, and whether each is required."""
  parameters = inspect.signature(function).parameters.values()
  return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
