"""A simulated annotator of image preferences.

Each image has a utility, which depends most on showing what the prompt asks for and then on
looks. Of two images, the annotator prefers the better one with the probability of Bradley and
Terry (Biometrika 39, 1952). As people do, it calls some images of similar utility a tie and
makes some mistakes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpref.shapes import flaws as flaws_lib
from jaxpref.shapes import prompts

CORRECT = 2.0  # utility of an image without flaws
PARTIAL = 0.8  # utility of a wrong image, times its share of correct objects
PENALTIES: Mapping[str, float] = {
  "cropped": 0.5,
  "blur": 0.9,
  "noise": 0.7,
  "low_contrast": 0.6,
}
TIE_WITHIN = 0.25  # utilities closer than this become a tie with probability TIE_RATE
TIE_RATE = 0.5  # gives about 12 % ties over the pairs of the corpus
SLIP_RATE = 0.04  # probability that the preference is reversed; ties are not affected
SCORE_NOISE = 0.2  # standard deviation of `observed_score`


def utility(flaws: tuple[str, ...], spec: prompts.Spec) -> float:
  """Returns the utility of an image with these flaws, at most `CORRECT`.

  Args:
    flaws: names from `flaws.applicable(spec)`.
    spec: the meaning of the prompt.

  Raises:
    ValueError: a flaw is unknown or not applicable to this prompt.
  """
  if unknown := set(flaws) - set(flaws_lib.applicable(spec)):
    raise ValueError(f"{sorted(unknown)} are not applicable to {prompts.caption(spec)!r}")
  looks = sum(PENALTIES[f] for f in flaws if f in PENALTIES)
  if flaws_lib.is_right(flaws):
    return CORRECT - looks
  asked = sum(thing.count for thing in spec.things)
  return PARTIAL * (asked - 1) / asked - looks


def prefer(utility_0: float, utility_1: float, rng: np.random.Generator) -> float:
  """Samples which of two images the annotator prefers.

  Unless it is a tie, image 0 is preferred with probability `p + SLIP_RATE (1 - 2 p)`, where
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
  """Samples the annotator's ranking of images, from best to worst.

  The ranking follows Plackett and Luce's model (Applied Statistics 24, 1975): the best image is
  chosen with a probability proportional to exp(utility), then the best of the rest, and so on.
  For two images it equals `prefer` without ties and slips.
  """
  # Sorting utilities with Gumbel noise samples from this distribution.
  noisy = np.asarray(utilities) + rng.gumbel(size=len(utilities))
  return [int(k) for k in np.argsort(-noisy)]


def observed_score(utility: float, rng: np.random.Generator) -> float:
  """Returns the score of a simulated preference scorer: utility plus Gaussian noise."""
  return utility + SCORE_NOISE * float(rng.standard_normal())
