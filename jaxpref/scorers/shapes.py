"""Scorers of the shapes world: its verifier, which sees only pixels and prompts."""

from collections.abc import Sequence

import numpy as np

from jaxpref.errors import UserError
from jaxpref.shapes import prompts, verifier


def category(prompt: str) -> str:
  """Returns the GenEval category of a prompt.

  Raises:
    UserError: the prompt is not a caption of the shapes world.
  """
  try:
    return prompts.parse(prompt).category
  except ValueError as error:
    raise UserError(f"the shapes scorers cannot judge it: {error}") from None


def correct(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """Returns 1.0 for each image that shows exactly what its prompt asks for, else 0.0.

  Args:
    images: uint8 [N, H, W, 3], or N images of different sizes.
    texts: N captions of the shapes world.

  Returns:
    Scores, float64 [N].

  Raises:
    UserError: a prompt is not a caption of the shapes world.
  """
  for text in texts:
    category(text)
  pairs = zip(images, texts, strict=True)
  return np.array([verifier.is_correct(i, t) for i, t in pairs], np.float64)


def quality(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """Rates how clean the images look, from 0 to 1; the prompts do not matter.

  Args:
    images: uint8 [N, H, W, 3], or N images of different sizes.
    texts: N prompts of any kind.

  Returns:
    Scores, float64 [N].
  """
  pairs = zip(images, texts, strict=True)
  return np.array([verifier.visual_quality(i) for i, _ in pairs], np.float64)


# Version 1 of quality measured only grain, in grey and away from objects; it missed blotches.
SCORERS = {"correct": ("1", correct), "quality": ("2", quality)}
