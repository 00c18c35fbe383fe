"""Every loss in float64 numpy, written from the equations alone; nothing of jaxpref here.

Arguments are residuals (predictions minus targets) by arm, [B, ...], of policy and reference.
"""

import numpy as np


def err(residual):
  return (residual**2).reshape(len(residual), -1).mean(1)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def sigmoid(x):
  return np.exp(log_sigmoid(x))


def sft(p, r):
  return err(p["e"])


def csft(p, r, desirable):
  return err(p["x"])


def dro(p, r, margin):
  rise_e, rise_p = err(p["e"]) - err(r["e"]), err(p["p"]) - err(r["p"])
  return np.maximum(rise_e - rise_p + margin, 0.0)


def dpo(p, r, beta, variant):
  margin = (err(p["l"]) - err(r["l"])) - (err(p["w"]) - err(r["w"]))
  if variant == "sigmoid":
    return -log_sigmoid(0.5 * beta * margin)
  if variant == "hinge":
    return np.maximum(1.0 - 0.5 * beta * margin, 0.0)
  return (margin - 1.0 / (2.0 * beta)) ** 2


def spin(p, r, beta):
  return dpo(p, r, beta, "sigmoid")


def simpo(p, r, beta, target_margin):
  return -log_sigmoid(0.5 * beta * (err(p["l"]) - err(p["w"])) - target_margin)


def mapo(p, r, beta, snr):
  def score(x):
    return snr * x / (np.exp(snr * x) - 1.0)

  lead = 1000.0 * (score(err(p["w"])) - score(err(p["l"])))
  return err(p["w"]) - beta * log_sigmoid(lead)


def kto(
  p, r, desirable, beta, utility, weight_desirable, weight_undesirable, reference_point=None
):
  gain = err(r["x"]) - err(p["x"])
  if reference_point is None:
    reference_point = max(gain.mean(), 0.0)
  sign = np.where(desirable, 1.0, -1.0)
  value = sign * beta * (gain - reference_point)
  worth = {
    "kt": sigmoid(value),
    "loss_averse": log_sigmoid(value),
    "risk_seeking": -log_sigmoid(-value),
  }[utility]
  return np.where(desirable, weight_desirable, weight_undesirable) * (1.0 - worth)


def listwise(p, r, beta):
  """The probability of the order as a product, choice by choice."""
  scores = np.stack([-0.5 * beta * (err(p[k]) - err(r[k])) for k in sorted(p)], 1)
  loss = np.zeros(len(scores))
  for first in range(scores.shape[1] - 1):
    weights = np.exp(scores[:, first:] - scores[:, first:].max(1, keepdims=True))
    loss -= np.log(weights[:, 0] / weights.sum(1))
  return loss


def dspo(p, r, beta, frozen_loser=None):
  rise_l = (err(p["l"]) if frozen_loser is None else frozen_loser) - err(r["l"])
  inside = -0.5 * beta * ((err(p["w"]) - err(r["w"])) - rise_l)
  weight = (1.0 - sigmoid(inside)).reshape(-1, *(1,) * (p["w"].ndim - 1))
  return err(p["w"] - beta * weight * (p["w"] - r["w"]))


def sdpo_scale(p, mu):
  along, square = (p["w"] * p["l"]).sum(), (p["w"] ** 2).sum()
  return 1.0 if along <= 0 else min((1.0 - mu) * square / along, 1.0)


def rwr(p, r, weight):
  return weight * err(p["x"])


def awm(p, r, old, advantage, strength, clip, weight_reference, weight_old):
  a = strength * advantage
  ratio = np.exp(np.clip(err(old["x"]) - err(p["x"]), -20.0, 20.0))
  fit = np.maximum(-a * ratio, -a * ratio.clip(1 - clip, 1 + clip))
  near = weight_reference * err(p["x"] - r["x"]) + weight_old * err(p["x"] - old["x"])
  return fit + near


def nft_sides(p, old, beta):
  return beta * p["x"] + (1 - beta) * old["x"], (1 + beta) * old["x"] - beta * p["x"]


def nft_sizes(sides):
  return [np.abs(of).reshape(len(of), -1).mean(1).clip(min=1e-5) for of in sides]


def nft(p, r, old, advantage, beta, clip, weight_reference, sizes=None):
  sides = nft_sides(p, old, beta)
  better, worse = (
    err(of) / size for of, size in zip(sides, sizes or nft_sizes(sides), strict=True)
  )
  good = (1 + (advantage / clip).clip(-1, 1)) / 2
  fit = clip * (good * better + (1 - good) * worse) / beta
  return fit + weight_reference * err(p["x"] - r["x"])


def ppo(
  p, r, advantage, std, gain, length, variant, clip, density, tie, weight_reference, old=None
):
  def log_prob(residual):
    if density == "square":
      return -err(residual)
    return -err(residual) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))

  now = log_prob(p["x"])
  if variant == "score":
    fit = -advantage * now
  else:
    log_ratio, kl = now - log_prob(old["x"]), err(p["x"] - old["x"]) / (2 * std**2)
    if variant == "guarded":
      log_ratio = std * (log_ratio + kl)
    ratio = np.exp(log_ratio.clip(-20.0, 20.0))
    inside = -advantage * ratio.clip(1 - clip, 1 + clip)
    fit = inside if variant == "dpok" else np.maximum(-advantage * ratio, inside)
    if variant == "guarded":
      fit = fit / length
    if variant == "region":
      outward = np.where(advantage > 0, ratio > 1, ratio < 1)
      fit = np.where((kl >= clip) & outward, 0.0, -advantage * ratio)
  factor = {
    "step": 1 / (2 * std**2),
    "scaled": length / (2 * std**2),
    "prediction": 1 / gain**2,
  }
  return fit + weight_reference * factor[tie] * err(p["x"] - r["x"])


def of_steps(residual):
  """Numbers [S, B] that stand for the log-ratios of trajectories of S steps."""
  return np.square(residual).mean(1).T


def prdp(p, r, advantage, beta, clip, old=None):
  """The larger one of two losses: of the log-ratios, and of clipped ones."""

  def loss(a, b):
    return (beta * (a.sum(0) - b.sum(0)) - (advantage[:, 0] - advantage[:, 1])) ** 2

  now = [of_steps(p[arm]) for arm in "ab"]
  if old is None:
    return loss(*now)
  before = [of_steps(old[arm]) for arm in "ab"]
  near = [u.clip(v - clip, v + clip) for u, v in zip(now, before, strict=True)]
  return np.maximum(loss(*now), loss(*near))


def step_pairs(p, r, std, reward, beta, clip):
  """The density cancels in the ratio but for its exponent."""

  def log_ratio(arm, side):
    log = (err(r[arm]) - err(p[arm])) / (2 * std[:, side] ** 2)
    return np.log(np.exp(log).clip(1 - clip, 1 + clip)) if clip else log

  loss = -log_sigmoid(beta * (log_ratio("w", 0) - log_ratio("l", 1)))
  return np.where(reward[:, 0] > reward[:, 1], loss, 0.0)


def by_group(residual):
  return np.stack([err(residual[k]) for k in sorted(residual)], 1)


def dgpo_fixed(p, r, old, advantage, beta, clip):
  """The groups' weights, and which errors have no gradient: both are constants."""
  now = by_group(p)
  weight = sigmoid(beta * (advantage * (now - by_group(r))).mean(1))
  with np.errstate(over="ignore"):
    ratio = np.exp(by_group(old) - now)
  gone = np.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
  return weight, gone, now


def dgpo(p, r, old, advantage, beta, clip, weight_reference, fixed=None):
  weight, gone, before = fixed or dgpo_fixed(p, r, old, advantage, beta, clip)
  fit = weight * (advantage * np.where(gone, before, by_group(p))).mean(1)
  return fit + weight_reference * by_group({k: p[k] - r[k] for k in p}).mean(1)
