"""Scorers of the shapes world, by its verifier; they see only pixels and prompts."""

from collections.abc import Sequence

import numpy as np

from jaxpref.errors import UserError
from jaxpref.shapes import prompts, verifier


def correct(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """1.0 where an image shows exactly what its prompt asks for, else 0.0.

  Args:
    images: uint8 [N, H, W, 3].
    texts: N captions of the shapes world.

  Returns:
    Scores, float64 [N].

  Raises:
    UserError: a prompt is not one of the shapes world.
  """
  try:
    for text in texts:
      prompts.parse(text)
  except ValueError as error:
    raise UserError(f"scorer shapes.correct: {error}") from None
  pairs = zip(images, texts, strict=True)
  return np.array([verifier.is_correct(i, t) for i, t in pairs], np.float64)


def quality(images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """How clean the images look, from 0 to 1; the prompts do not matter.

  Args:
    images: uint8 [N, H, W, 3].
    texts: N prompts of any kind.

  Returns:
    Scores, float64 [N].
  """
  pairs = zip(images, texts, strict=True)
  return np.array([verifier.visual_quality(i) for i, _ in pairs], np.float64)


# Quality 1 measured grain alone, in grey and away from objects; blotches passed.
SCORERS = {"correct": ("1", correct), "quality": ("2", quality)}
