"""Scorers of the shapes world: its verifier, and a model of its annotator's preferences.

Both see only pixels and prompts. The verifier is exact; the model is learned, from pairs.
"""

from collections.abc import Sequence

import numpy as np

from jaxpref.errors import UserError
from jaxpref.scorers import Images, Reward
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


def preference(images: Images, texts: Sequence[str]) -> np.ndarray:
  """Rates images as a model of the simulated annotator does, for captions of the shapes world.

  Args:
    images: uint8 [N, H, W, 3], or N images of different sizes.
    texts: N captions.

  Returns:
    Scores, float32 [N], comparable for images of one caption.
  """
  from jaxpref.scorers.base import preference_scores  # noqa: PLC0415  # imports JAX

  return preference_scores.score(preference_scores.load_preference(), images, texts)


def _preference_reward(dtype: str) -> Reward:
  from jaxpref.scorers.base import preference_scores  # noqa: PLC0415  # imports JAX

  return preference_scores.reward(dtype)


# Version 1 of quality measured only grain, in grey and away from objects; it missed blotches.
SCORERS = {
  "correct": ("1", correct),
  "quality": ("2", quality),
  "preference": ("1", preference),
}
REWARDS = {"preference": _preference_reward}
