"""The meanings of all metrics that a run logs, for the report."""

import fnmatch
from typing import Literal, NamedTuple


class Metric(NamedTuple):
  """The meaning of a metric.

  Attributes:
    meaning: what the metric measures, and which values are good.
    scale: 'share' for numbers from 0 to 1, 'count' for whole numbers from 0 on, else ''.
  """

  meaning: str
  scale: Literal["", "share", "count"] = ""


_ERROR = "Denoising error, a mean square, of"
_REWARD = "How far the model's denoising error is below the reference's on"
_TIME = "Share of an update's time spent on"
_SECONDS = "Seconds of the iteration spent on"

# Keys are names or patterns; patterns match the ranks of lists, whose number is configurable.
METRICS: dict[str, Metric] = {
  "loss": Metric(
    "The training loss, averaged over the batch. It is noisy, and preference losses hardly "
    "change while the images do: judge a run by its images and scores."
  ),
  "err/policy_e": Metric(f"{_ERROR} the model on expert images. Should fall."),
  "err/policy_p": Metric(
    f"{_ERROR} the model on its own samples. It is exactly 0 if the model's own prediction is "
    "the target: without guidance, with new samples for every update."
  ),
  "err/policy_w": Metric(f"{_ERROR} the model on preferred images. Should not rise."),
  "err/policy_l": Metric(
    f"{_ERROR} the model on the images not preferred. It may rise, but images degrade if it "
    "rises steeply."
  ),
  "err/policy_x": Metric(
    f"{_ERROR} the model on the images of the batch. With ppo: mean square of the "
    "noise that the model must have added in the sampled steps."
  ),
  "err/policy_[0-9]*": Metric(f"{_ERROR} the model on the images of that rank; 1 is the best."),
  "err/reference_e": Metric(f"{_ERROR} the fixed reference on expert images."),
  "err/reference_p": Metric(
    f"{_ERROR} the reference on the model's samples. It grows as the model moves away from it."
  ),
  "err/reference_w": Metric(f"{_ERROR} the fixed reference on the same preferred images."),
  "err/reference_l": Metric(f"{_ERROR} the fixed reference on the same images not preferred."),
  "err/reference_x": Metric(f"{_ERROR} the fixed reference on the same images."),
  "err/reference_[0-9]*": Metric(f"{_ERROR} the reference on the images of that rank."),
  "err/old_*": Metric(f"{_ERROR} the model's lagging average on the same images."),
  "distance/reference": Metric(
    "Mean square of the difference between the model's predictions and the reference's, which "
    "stands for their divergence. If it keeps growing, look for reward hacking."
  ),
  "distance/old": Metric(
    "Mean square of the difference between the predictions of the model and of its lagging "
    "average."
  ),
  "distance/steps": Metric(
    "Distance of the sampled steps of the model and of the reference, as loss.tie says. If it "
    "keeps growing, look for reward hacking."
  ),
  "ratio/mean": Metric(
    "Mean ratio of the probabilities of sampled steps, of the model and of the model that has "
    "sampled them. It is 1 in the first update of a round."
  ),
  "ratio/approx_kl": Metric("Half the mean square of the logarithm of that ratio."),
  "ratio/stopped": Metric(
    "Share of steps without a gradient, because they have moved far enough from the model that "
    "has sampled, the way their advantage leads.",
    "share",
  ),
  "ratio/clipped_high": Metric("Share of steps whose ratio is above 1 + loss.clip.", "share"),
  "ratio/clipped_low": Metric("Share of steps whose ratio is below 1 - loss.clip.", "share"),
  "reward/mean": Metric("Mean reward of the round's or update's images. Should rise."),
  "reward/std": Metric("Standard deviation of the rewards of the round's images."),
  "reward/spread": Metric(
    "Difference of the highest and the lowest reward of a prompt, averaged over the prompts."
  ),
  "reward/equal_groups": Metric(
    "Share of prompts whose images all have the same reward: nothing is learned from them.",
    "share",
  ),
  "reward/advantage": Metric("Mean absolute advantage of the round's images."),
  "reward/*.*": Metric("Mean score of the round's or update's images by the scorer."),
  "alarm/vendi": Metric(
    "Vendi score of the alarms' images, by pixels: the effective number of different images. "
    "If it falls far, the images become similar."
  ),
  "alarm/kl": Metric(
    "Divergence of the policy from the base, in nats an image, over the steps of ancestral "
    "sampling. It grows as the reward is bought."
  ),
  "alarm/*.*": Metric(
    "Mean score of the alarms' images, for prompts of the evaluation. Where a scorer that is "
    "trained on rises and another falls, the reward is being exploited."
  ),
  "nft/optimality": Metric("Mean optimality of the images, from 0 to 1; near 0.5.", "share"),
  "dgpo/preference": Metric(
    "How far the groups' order is from being learned, times beta. Starts at 0 and should fall."
  ),
  "dgpo/stopped": Metric(
    "Share of images without a gradient, because the model has moved far enough.", "share"
  ),
  "step_pairs/decided": Metric(
    "Share of pairs of steps of which one is better. The others have no gradient.", "share"
  ),
  "step_pairs/stopped": Metric(
    "Share of steps without a gradient, because the ratio of the model's and the reference's "
    "probability is further from 1 than loss.clip.",
    "share",
  ),
  "judge/margin": Metric(
    "How much larger the reward of the preferred image of a pair is than the other's. Should "
    "rise: from 0, or from the margin of the scorer that the model begins as."
  ),
  "judge/accuracy": Metric(
    "Share of an update's pairs whose preferred image has the larger reward. Chance is one "
    "half; after the first pass over the data these pairs have been trained on.",
    "share",
  ),
  "prdp/log_ratio": Metric(
    "How much larger the log-ratio of a pair's better trajectory is than the other's, times "
    "beta. Starts at 0 and should rise to prdp/reward."
  ),
  "prdp/far": Metric(
    "Share of the steps whose log-ratio has changed by more than loss.clip since they were "
    "sampled.",
    "share",
  ),
  "prdp/reward": Metric("Mean absolute difference of the advantages of a pair."),
  "rwr/square_weight": Metric(
    "Mean square of the weights, whose mean is 1. The number of images divided by it is the "
    "number that effectively count."
  ),
  "err/winning": Metric(
    f"{_ERROR} the improver when it turns the loser into the winner, its actual task."
  ),
  "err/reconstruction": Metric(f"{_ERROR} the improver when it reconstructs its input image."),
  "err/unconditional": Metric(f"{_ERROR} the improver without prompt and image."),
  "rewards/expert": Metric(f"{_REWARD} expert images. Should rise above 0."),
  "rewards/policy": Metric(
    f"{_REWARD} the model's own samples. It should be below rewards/expert."
  ),
  "rewards/winner": Metric(
    f"{_REWARD} preferred images. Below 0, the model is worse at them than the reference."
  ),
  "rewards/loser": Metric(f"{_REWARD} the images not preferred. Usually falls below 0."),
  "rewards/margin": Metric(
    "How far the preferred images are ahead of the others, in reward or, without a reference, "
    "in denoising error. Should rise; if it keeps growing, the model may overfit."
  ),
  "rewards/accuracy": Metric(
    "Share of rows in which the preferred image is ahead. 50 % is chance; near 100 % there is "
    "little left to learn.",
    "share",
  ),
  "dro/active": Metric(
    "Share of rows with a non-zero hinge loss. At 0 the model learns nothing more: choose a "
    "larger loss.margin or stop.",
    "share",
  ),
  "kto/kl": Metric("Mean reward of the batch, at least 0; the zero point of the rewards."),
  "kto/desirable": Metric("Share of desirable images in the batch.", "share"),
  "csft/desirable": Metric("Share of desirable images in the batch.", "share"),
  "mapo/bonus": Metric(
    "The negated part of the loss that compares winner and loser. It rises towards 0 as the "
    "winners' errors fall below the losers'."
  ),
  "sdpo/scale": Metric(
    "Factor of the losers' gradient. It is lower when the gradient would increase the winners' "
    "errors more.",
    "share",
  ),
  "optim/grad_norm": Metric(
    "Norm of the gradient before clipping. Lower the learning rate if it has spikes; at 0 the "
    "model learns nothing."
  ),
  "optim/lr": Metric("Learning rate of the update."),
  "optim/skipped": Metric(
    "Updates skipped so far because the loss or gradient was non-finite. Should stay 0.",
    "count",
  ),
  "perf/rows_per_second": Metric("Data rows trained on per second."),
  "perf/images_per_second": Metric("Data images trained on per second."),
  "perf/tflops_per_second": Metric(
    "Floating-point operations that the method needs, 10^12 per second and device."
  ),
  "perf/mfu": Metric(
    "Model FLOPs utilization: perf/tflops_per_second as a share of the device's peak."
  ),
  "perf/peak_gib": Metric("Peak device memory so far, in GiB."),
  "perf/compile_seconds": Metric("Seconds spent compiling so far. Should stop growing early."),
  "time/data": Metric(f"{_TIME} the batch. Should be near 0.", "share"),
  "time/rollout": Metric(f"{_TIME} sampling from the model.", "share"),
  "time/update": Metric(f"{_TIME} gradient and optimizer.", "share"),
  "pairs/pairs": Metric("Pairs generated for the iteration.", "count"),
  "pairs/trained_on": Metric(
    "Generated pairs whose images differ enough to train on.", "count"
  ),
  "pairs/change": Metric(
    "Root mean square difference between the latents of winner and loser. Near 0 the pairs "
    "teach nothing."
  ),
  "time/generate_seconds": Metric(f"{_SECONDS} generating losers."),
  "time/improve_seconds": Metric(f"{_SECONDS} improving the losers."),
  "time/write_seconds": Metric(f"{_SECONDS} encoding and writing the pairs."),
  "time/train_seconds": Metric(f"{_SECONDS} training and evaluation."),
}


def find_metric(name: str) -> Metric | None:
  """Looks up a metric by its logged name; returns None for metrics of other packages."""
  found = (m for key, m in METRICS.items() if fnmatch.fnmatchcase(name, key))
  return next(found, None)
