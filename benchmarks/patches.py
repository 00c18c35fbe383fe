"""A held-out judge of looks: how near the patches of an image are to patches of clean renders.

The idea is PatchCore's (Roth et al., CVPR 2022): what is wrong with an image shows in patches
that have no near neighbour among patches of good images. It shares nothing with
`shapes.quality`, which segments an image and measures what it finds, and it has no part in
choosing data or settings. It does not read prompts. Its scorer is `patches.likeness`.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from jaxpref.shapes import flaws, prompts

SIZE, SIDE, STEP = 32, 3, 2  # pixels of an image and of a patch, and between patches
RENDERS, PATCHES = 1000, 20  # clean images of training prompts, and patches of each


def likeness(images: Sequence[np.ndarray] | np.ndarray, texts: Sequence[str]) -> np.ndarray:
  """Returns minus the distance of each image's patches to the nearest clean patches.

  Args:
    images: N images, uint8 [H, W, 3]; they are resized to 32 x 32.
    texts: N prompts of any kind.

  Returns:
    Scores, float64 [N], at most 0: root mean squares in units of 1/255, mean over patches.
  """
  bank, squares = _bank()
  scores = []
  for image, _ in zip(images, texts, strict=True):
    patches = _patches(image)[::STEP, ::STEP].reshape(-1, bank.shape[1])
    # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, of the nearest b for each a
    nearest = np.min(squares - 2 * patches @ bank.T, axis=1) + np.sum(patches**2, axis=1)
    scores.append(-np.sqrt(np.maximum(nearest, 0) / bank.shape[1]).mean())
  return np.array(scores, np.float64)


@functools.cache
def _bank() -> tuple[np.ndarray, np.ndarray]:
  """Returns patches of clean renders, float32 [N, 3 * SIDE^2], and their squared lengths."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(RENDERS):
    image, _ = flaws.corpus_image(prompts.draw_prompt(rng, "train"), rng, flawed=False)
    patches = _patches(image)
    rows, columns = rng.integers(len(patches), size=(2, PATCHES))
    found.append(patches[rows, columns].reshape(PATCHES, -1))
  bank = np.concatenate(found)
  return bank, np.sum(bank**2, axis=1)


def _patches(image: np.ndarray) -> np.ndarray:
  """Returns all patches of an image, float32 [rows, columns, 3, SIDE, SIDE]."""
  small = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
  windows = sliding_window_view(np.asarray(small, np.float32), (SIDE, SIDE), axis=(0, 1))
  return np.ascontiguousarray(windows)


SCORERS = {"likeness": ("1", likeness)}
