"""Advantages: rewards compared with those of other images, in float64 on the host.

Images of one prompt are a group. Published methods differ in what they subtract, in what they
divide by, and in the clip; the arguments of `advantages` cover them. Rewards of all devices
and processes come in together, so that a group may be spread over them.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from jaxpref.errors import UserError

CENTERS = ("group", "global")
SCALES = ("group", "global", "none")


def advantages(
  rewards: np.ndarray,
  group: np.ndarray,
  *,
  center: str = "group",
  scale: str = "group",
  ddof: int = 0,
  eps: float = 1e-4,
  clip: float | None = None,
) -> np.ndarray:
  """Computes (reward - mean) / (standard deviation + eps), clipped.

  Equal rewards give advantages of 0. So does a group of one image with `center='group'`.

  Args:
    rewards: of the images, [N]; integers and booleans are converted first.
    group: which images are of one prompt, int [N].
    center: whose mean is subtracted: the 'group's or that of all images ('global').
    scale: whose standard deviation divides: the 'group's, that of all rewards ('global'), or
      'none'.
    ddof: 0 divides a sum of squares by their number, 1 by one less, as torch does.
    eps: added to the standard deviation.
    clip: largest absolute value; None: no clip.

  Returns:
    float64 [N].

  Raises:
    UserError: a setting is unknown, or rewards and groups differ in number.
  """
  for name, given, known in (("center", center, CENTERS), ("scale", scale, SCALES)):
    if given not in known:
      raise UserError(f"{name} of advantages must be one of {', '.join(known)} (got {given!r})")
  values, number = _checked(rewards, group)
  whole = np.zeros(len(values), int)
  means = _mean(values, number if center == "group" else whole)
  found = values - means
  if scale != "none":
    found /= _deviation(values, number if scale == "group" else whole, ddof) + eps
  return found if clip is None else found.clip(-clip, clip)


def sum_advantages(
  rewards: np.ndarray,
  weights: Sequence[float],
  group: np.ndarray,
  *,
  clip: float | None = None,
  **settings,
) -> np.ndarray:
  """Normalises each of several rewards, then sums them with weights, then clips.

  A reward with a wide range then counts no more than its weight says.

  Args:
    rewards: of each scorer, [N, K].
    weights: of the scorers, K numbers.
    group: see `advantages`.
    clip: largest absolute value of the sum; None: no clip.
    **settings: of `advantages`.

  Returns:
    float64 [N].
  """
  each = [
    weight * advantages(column, group, **settings)
    for column, weight in zip(np.asarray(rewards, float).T, weights, strict=True)
  ]
  total = np.sum(each, axis=0)
  return total if clip is None else total.clip(-clip, clip)


def windowed_advantages(
  rewards: np.ndarray,
  prompts: Sequence[Hashable],
  windows: Mapping[Hashable, Sequence[float]],
  *,
  size: int = 32,
  least: int = 16,
  eps: float = 1e-6,
  clip: float | None = None,
) -> tuple[np.ndarray, dict[Hashable, list[float]]]:
  """Compares each reward with the last rewards of its prompt (DDPO, arXiv 2305.13301).

  The rewards first enter their prompt's window. A prompt with fewer than `least` values is
  compared with the whole batch instead.

  Args:
    rewards: of the images, [N].
    prompts: their prompts, N; keys of the windows.
    windows: the last rewards of each prompt, oldest first; part of a run's state.
    size: rewards that a window keeps.
    least: rewards with which a window is used.
    eps: added to the standard deviation.
    clip: largest absolute value; None: no clip.

  Returns:
    Advantages, float64 [N], and the new windows.
  """
  values = np.asarray(rewards, np.float64)
  renewed = {prompt: list(window) for prompt, window in windows.items()}
  for prompt, value in zip(prompts, values, strict=True):
    renewed[prompt] = [*renewed.get(prompt, []), float(value)][-size:]
  found = np.empty(len(values))
  for i, prompt in enumerate(prompts):
    seen = renewed[prompt] if len(renewed[prompt]) >= least else values
    found[i] = (values[i] - np.mean(seen)) / (np.std(seen) + eps)
  return (found if clip is None else found.clip(-clip, clip)), renewed


def softmax_weights(
  rewards: np.ndarray, *, beta: float, group: np.ndarray | None = None
) -> np.ndarray:
  """Computes weights proportional to exp(beta reward), with mean 1.

  Reward-weighted regression, as DDPO's authors compare with it (arXiv 2305.13301).

  Args:
    rewards: of the images, [N].
    beta: inverse temperature.
    group: int [N]: the mean is 1 in each group; None: over all images.

  Returns:
    float64 [N].
  """
  values, number = _checked(rewards, np.zeros(len(rewards), int) if group is None else group)
  highest = np.full(number.max() + 1, -np.inf)
  np.maximum.at(highest, number, values)
  weights = np.exp(beta * (values - highest[number]))
  return weights / _mean(weights, number)


def best_and_worst(
  rewards: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Finds the images with the highest and the lowest reward of each group.

  Of equal rewards the first image is taken.

  Args:
    rewards: of the images, [N].
    group: int [N].

  Returns:
    Of each group, by number: the best image, the worst image, and how far their rewards are
    apart, which is 0 where no pair can be formed.
  """
  values, number = _checked(rewards, group)
  members = [np.flatnonzero(number == g) for g in range(number.max() + 1)]
  best = np.array([of[np.argmax(values[of])] for of in members])
  worst = np.array([of[np.argmin(values[of])] for of in members])
  return best, worst, values[best] - values[worst]


def _checked(rewards: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns rewards as float64 [N] and the groups' numbers from 0 on."""
  values, ids = np.asarray(rewards, np.float64), np.asarray(group)
  if values.ndim != 1 or values.shape != ids.shape or not len(values):
    raise UserError(
      f"rewards and groups must be [N] with N > 0 (got {values.shape} and {ids.shape})"
    )
  return values, np.unique(ids, return_inverse=True)[1]


def _mean(values: np.ndarray, number: np.ndarray) -> np.ndarray:
  """Returns the mean of each value's group, [N]."""
  return (np.bincount(number, values) / np.bincount(number))[number]


def _deviation(values: np.ndarray, number: np.ndarray, ddof: int) -> np.ndarray:
  """Returns the standard deviation of each value's group, [N]; 0 where it is undefined."""
  squares = np.bincount(number, np.square(values - _mean(values, number)))
  return np.sqrt(squares / np.maximum(np.bincount(number) - ddof, 1))[number]
