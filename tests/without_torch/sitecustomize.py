"""As if PyTorch were not installed, for programs that find this folder on PYTHONPATH."""

from importlib.machinery import PathFinder

_find_spec = PathFinder.find_spec


@classmethod  # as the original, which pytest keeps in a class of its own
def _find_all_but_torch(cls, name, path=None, target=None):
  return None if name == "torch" else _find_spec(name, path, target)


PathFinder.find_spec = _find_all_but_torch
