"""Scorers that count their calls."""

import numpy as np

from jaxpref import scorers

CALLS = []


def red(images, prompts):
  """Returns the mean of the red channel."""
  CALLS.append(len(images))
  assert len(images) == len(prompts)
  for image in images:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
  return np.array([image[..., 0].mean() for image in images])


def green(images, prompts):
  """Returns the mean of the green channel."""
  return np.array([image[..., 1].mean() for image in images])


def length(images, prompts):
  """Returns the number of the prompt's letters; for two captions it is not finite."""
  CALLS.append(len(images))
  other = {"caption 3": np.nan, "caption 0": np.inf}
  return [other.get(p[:9], len(p)) for p in prompts]


def wrong(images, prompts):
  return np.zeros((len(images), 2))


def _red_reward(dtype):
  """The same, inside of a program."""
  return scorers.Reward(
    np.float32(255),
    lambda prompts: np.zeros((len(prompts), 1), np.int32),
    lambda scale, images, tokens: scale * images[..., 0].mean((1, 2)),
  )


REWARDS = {"red": _red_reward}
SCORERS = {
  "red": ("1", red),
  "green": ("1", green),
  "length": ("2-hf", length),
  "wrong": ("1", wrong),
  "slash": ("1/2", red),
}
