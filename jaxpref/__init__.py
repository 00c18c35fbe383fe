"""Preference tuning of text-to-image diffusion models in JAX."""

import importlib
from types import ModuleType

__version__ = "0.1.0"
_PACKAGES = ("data", "diffusion", "evaluation", "losses", "models", "scorers", "training")


def __getattr__(name: str) -> ModuleType:
  """Imports a package at its first use, as in `jaxpref.losses.dpo_loss`."""
  if name in _PACKAGES:
    return importlib.import_module(f"jaxpref.{name}")
  raise AttributeError(f"module 'jaxpref' has no attribute {name!r}")
