"""Scorers for rehearsals: fixed random projections of an image, on the real ones' scales."""

import functools

import numpy as np
from PIL import Image


def _score(seed, mean, std, images, prompts):
  weights = np.random.default_rng(seed).normal(size=16 * 16 * 3)
  small = np.stack(
    [
      np.asarray(Image.fromarray(image).resize((16, 16)), np.float64).ravel()
      for image in images
    ]
  )
  return mean + std * (small / 255 - 0.5) @ weights / np.sqrt(weights.size / 12)


SCORERS = {
  "pickscore": ("rehearsal", functools.partial(_score, 0, 20.7, 1.2)),
  "hpsv2": ("rehearsal", functools.partial(_score, 1, 27.0, 1.5)),
  "aesthetic": ("rehearsal", functools.partial(_score, 2, 5.9, 0.5)),
  "clip": ("rehearsal", functools.partial(_score, 3, 33.7, 4.0)),
  "imagereward": ("rehearsal", functools.partial(_score, 4, 0.2, 1.0)),
}
