"""The meaning of every metric that a run logs, for the report."""

import fnmatch
from typing import Literal, NamedTuple


class Metric(NamedTuple):
  """Meaning of a metric.

  Attributes:
    meaning: what it is and what to look for.
    scale: 'share' of numbers from 0 to 1, 'count' of whole numbers from 0 on, or ''.
  """

  meaning: str
  scale: Literal["", "share", "count"] = ""


_ERROR = "Denoising error, a mean square, of"
_REWARD = "How far the model's denoising error is below the reference's on"
_TIME = "Share of an update's time spent on"
_SECONDS = "Seconds of the iteration spent on"

# By name; a pattern stands for the ranks of lists, which a configuration chooses.
METRICS: dict[str, Metric] = {
  "loss": Metric(
    "What training minimizes, averaged over the batch. It is noisy, and preference losses "
    "hardly move while the images change: judge by images and scores."
  ),
  "err/policy_e": Metric(f"{_ERROR} the model on expert images. Should fall."),
  "err/policy_p": Metric(
    f"{_ERROR} the model on its own samples. Exactly 0 where its own prediction is the "
    "target, as with samples generated anew for every update, without guidance."
  ),
  "err/policy_w": Metric(f"{_ERROR} the model on preferred images. Should not rise."),
  "err/policy_l": Metric(
    f"{_ERROR} the model on the images not preferred. It may rise; where it rises steeply, "
    "images degrade."
  ),
  "err/policy_x": Metric(f"{_ERROR} the model on the images of the batch."),
  "err/policy_[0-9]*": Metric(f"{_ERROR} the model on the images of that rank; 1 is the best."),
  "err/reference_e": Metric(f"{_ERROR} the reference, which stays fixed, on expert images."),
  "err/reference_p": Metric(
    f"{_ERROR} the reference on the model's samples. It grows as the model departs from it."
  ),
  "err/reference_w": Metric(
    f"{_ERROR} the reference, which stays fixed, on the same preferred images."
  ),
  "err/reference_l": Metric(
    f"{_ERROR} the reference, which stays fixed, on the same images not preferred."
  ),
  "err/reference_x": Metric(f"{_ERROR} the reference, which stays fixed, on the same images."),
  "err/reference_[0-9]*": Metric(f"{_ERROR} the reference on the images of that rank."),
  "err/winning": Metric(
    f"{_ERROR} the improver when it makes the winner out of the loser, the task it is for."
  ),
  "err/reconstruction": Metric(f"{_ERROR} the improver when it repeats the image it is shown."),
  "err/unconditional": Metric(f"{_ERROR} the improver without prompt and image."),
  "rewards/expert": Metric(f"{_REWARD} expert images. Should rise above 0."),
  "rewards/policy": Metric(
    f"{_REWARD} the model's own samples. Experts are to lead it; see rewards/margin."
  ),
  "rewards/winner": Metric(
    f"{_REWARD} preferred images. Below 0 the model has become worse at them."
  ),
  "rewards/loser": Metric(f"{_REWARD} the images not preferred. Usually falls below 0."),
  "rewards/margin": Metric(
    "How far the preferred images lead the others: in reward, or, in methods without a "
    "reference, in denoising error. Should rise; where it only grows, the model may overfit."
  ),
  "rewards/accuracy": Metric(
    "Share of rows in which the preferred image leads. 50 % is chance; near 100 % little is "
    "left to learn.",
    "share",
  ),
  "dro/active": Metric(
    "Share of rows whose hinge is open. At 0 nothing more is learned: choose a larger "
    "loss.margin or stop.",
    "share",
  ),
  "kto/kl": Metric("Mean reward of the batch, not below 0, from which rewards are measured."),
  "kto/desirable": Metric("Share of desirable images in the batch.", "share"),
  "csft/desirable": Metric("Share of desirable images in the batch.", "share"),
  "mapo/bonus": Metric(
    "The part of the loss that compares winner and loser, negated. It rises towards 0 as "
    "winners get the lower errors."
  ),
  "sdpo/scale": Metric(
    "Share of the losers' gradient that is kept. The lower, the more the winners needed "
    "protection.",
    "share",
  ),
  "optim/grad_norm": Metric(
    "Norm of the gradient before clipping. Spikes ask for a lower learning rate; at 0 "
    "nothing is learned."
  ),
  "optim/lr": Metric("Learning rate of the update, by the schedule."),
  "optim/skipped": Metric(
    "Updates skipped so far because loss or gradient was not finite. Should stay 0.", "count"
  ),
  "perf/rows_per_second": Metric("Rows of the data trained on a second."),
  "perf/images_per_second": Metric("Images of the data trained on a second."),
  "perf/tflops_per_second": Metric(
    "Floating-point operations that the method needs, 10^12 a second and device."
  ),
  "perf/mfu": Metric("Model FLOPs utilization: the same as a share of the device's peak."),
  "perf/peak_gib": Metric("Most device memory in use so far, GiB."),
  "perf/compile_seconds": Metric("Seconds spent compiling so far. Should stop growing early."),
  "time/data": Metric(f"{_TIME} the batch. Should be near 0.", "share"),
  "time/rollout": Metric(f"{_TIME} sampling from the model.", "share"),
  "time/update": Metric(f"{_TIME} gradient and optimizer.", "share"),
  "pairs/pairs": Metric("Pairs generated for the iteration.", "count"),
  "pairs/trained_on": Metric("Of these, pairs different enough to train on.", "count"),
  "pairs/change": Metric(
    "Root mean square difference of winner and loser, in latents. Near 0 there is nothing to "
    "learn from the pairs."
  ),
  "time/generate_seconds": Metric(f"{_SECONDS} generating losers."),
  "time/improve_seconds": Metric(f"{_SECONDS} improving them."),
  "time/write_seconds": Metric(f"{_SECONDS} encoding and writing the pairs."),
  "time/train_seconds": Metric(f"{_SECONDS} training and evaluation."),
}


def find_metric(name: str) -> Metric | None:
  """Looks a metric up by the name it is logged under; None for those of other packages."""
  found = (m for key, m in METRICS.items() if fnmatch.fnmatchcase(name, key))
  return next(found, None)
