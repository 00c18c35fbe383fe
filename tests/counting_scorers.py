"""Scorers of images of any size, as another package writes them; they count their images."""

import numpy as np

SCORED: list[int] = []


def _brightness(images, prompts):
  SCORED.append(len(images))
  return [float(np.mean(image)) / 255 for image in images]


def _contrast(images, prompts):
  SCORED.append(len(images))
  return [float(np.std(image)) / 255 for image in images]


def _mean_color(images):
  return np.stack([np.mean(image, axis=(0, 1)) + 1 for image in images])


FEATURES = {"color": _mean_color}
SCORERS = {"brightness": ("1", _brightness), "contrast": ("3", _contrast)}
