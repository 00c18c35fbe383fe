"""Preference losses: pure functions of per-sample errors, a file a method.

Besides its math a loss module says what a training step must feed it:

  ARMS: suffixes of the halves of a batch, in order: the data's, such as 'e', and with
    ROLLOUT the policy's own samples', such as 'p'.
  ROLLOUT: whether there is that second arm.
  REFERENCE: whether the frozen reference's errors are needed.
  HYPER: names of the configuration's fields under `loss` that `objective` takes.
  objective(err, ref, **hyper) -> (loss [B], metrics): `err` and `ref` are dicts from arm to
    float32 errors [B]; metrics are per-sample arrays, averaged by the caller.

A method of one's own is a module with these names: `config.loss.name` is either a file of
this package, or the dotted path of a module anywhere.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxpref.errors import UserError
from jaxpref.losses.dro import dro_loss
from jaxpref.losses.sft import sft_loss

__all__ = ["dro_loss", "hyper_of", "load_loss", "sft_loss"]

_CONTRACT = ("ARMS", "ROLLOUT", "REFERENCE", "HYPER", "objective")


def load_loss(name: str) -> ModuleType:
  """The module of a method.

  Raises:
    UserError: there is none of that name.
  """
  full = name if "." in name else f"{__name__}.{name}"
  try:
    module = importlib.import_module(full)
  except ModuleNotFoundError as error:
    if error.name != full and not full.startswith(f"{error.name}."):
      raise  # the module is there, something that it imports is not
    known = ", ".join(m.name for m in pkgutil.iter_modules(__path__))
    raise UserError(f"no loss {name!r}; there are {known}, or a module's dotted path") from None
  if lacking := [n for n in _CONTRACT if not hasattr(module, n)]:
    raise UserError(f"loss {name!r} is no loss module: it lacks {', '.join(lacking)}")
  if len(module.ARMS) != 1 + module.ROLLOUT:
    raise UserError(f"loss {name!r}: ARMS are the data's and, with ROLLOUT, the policy's own")
  return module


def hyper_of(module: ModuleType, settings: Mapping[str, Any]) -> dict[str, Any]:
  """A loss's hyper-parameters out of the configuration's `loss` section.

  Raises:
    UserError: the section lacks one.
  """
  if lacking := [f"'loss.{h}'" for h in module.HYPER if h not in settings]:
    raise UserError(f"loss {settings['name']!r} needs {', '.join(lacking)} in its config file")
  return {name: settings[name] for name in module.HYPER}
