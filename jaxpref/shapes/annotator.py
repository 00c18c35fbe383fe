"""A simulated annotator: what people would say of two images of one prompt.

Images have a utility: showing what was asked for counts most, then looks. Of two images
the better one is preferred with the probability of Bradley and Terry (Biometrika 39, 1952);
like people, the annotator calls a tie between images about as good, and slips at times.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpref.shapes import flaws as flaws_lib
from jaxpref.shapes import prompts

CORRECT = 2.0  # the utility of an image without a flaw
PARTIAL = 0.8  # of a wrong image, times the share of things that are still right
PENALTIES: Mapping[str, float] = {
  "cropped": 0.5,
  "blur": 0.9,
  "noise": 0.7,
  "low_contrast": 0.6,
}
TIE_WITHIN = 0.25  # utilities closer than this are called a tie at TIE_RATE,
TIE_RATE = 0.5  # which makes about 12 % ties over the pairs of the corpus
SLIP_RATE = 0.04  # how often the two answers are mixed up; ties are not
SCORE_NOISE = 0.2  # standard deviation of `observed_score`


def utility(flaws: tuple[str, ...], spec: prompts.Spec) -> float:
  """How good an image with these flaws is for its prompt; `CORRECT` at best.

  Args:
    flaws: names out of `flaws.applicable(spec)`.
    spec: what the prompt asks for.

  Raises:
    ValueError: a flaw is unknown, or cannot befall this prompt.
  """
  if unknown := set(flaws) - set(flaws_lib.applicable(spec)):
    raise ValueError(f"{sorted(unknown)} cannot befall {prompts.caption(spec)!r}")
  looks = sum(PENALTIES[f] for f in flaws if f in PENALTIES)
  if flaws_lib.is_right(flaws):
    return CORRECT - looks
  asked = sum(thing.count for thing in spec.things)
  return PARTIAL * (asked - 1) / asked - looks


def prefer(utility_0: float, utility_1: float, rng: np.random.Generator) -> float:
  """Which of two images the annotator prefers.

  Where it is no tie, image 0 is preferred with probability `p + SLIP_RATE (1 - 2 p)`,
  `p = sigmoid(utility_0 - utility_1)`.

  Returns:
    label_0: 1 for image 0, 0 for image 1, 0.5 for a tie; label_1 is `1 - label_0`.
  """
  tie, choice, slip = rng.random(3)
  gap = utility_0 - utility_1
  if abs(gap) < TIE_WITHIN and tie < TIE_RATE:
    return 0.5
  preferred = choice < 1 / (1 + np.exp(-gap))
  return float(preferred != (slip < SLIP_RATE))


def rank(utilities: Sequence[float], rng: np.random.Generator) -> list[int]:
  """Images in the order in which the annotator puts them, from best to worst.

  Drawn from Plackett and Luce's model (Applied Statistics 24, 1975): the best one is chosen
  with probability in proportion to exp(utility), then the best of the rest, and so on.
  Between any two images that is `prefer` without ties and slips.
  """
  # The order of utilities with Gumbel noise has this distribution.
  noisy = np.asarray(utilities) + rng.gumbel(size=len(utilities))
  return [int(k) for k in np.argsort(-noisy)]


def observed_score(utility: float, rng: np.random.Generator) -> float:
  """The utility as a preference scorer would see it, with Gaussian `SCORE_NOISE`."""
  return utility + SCORE_NOISE * float(rng.standard_normal())
