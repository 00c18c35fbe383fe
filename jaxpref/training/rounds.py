"""Rounds of online training: samples of the policy, their rewards, and the rows made of them.

A round samples G images for each of P prompts, scores them, compares the rewards, and serves
batches of rows for `rounds.updates` updates. Checkpoints are written between rounds, so that
the number of a round, the place in the prompts and the windows of rewards are the whole state.
`rounds/<k>.json` in the workdir has the prompts, seeds and scores of round k.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxpref import scorers, sharding
from jaxpref.data import encode, row_set
from jaxpref.data.gather import Gather
from jaxpref.errors import DivergedError, UserError
from jaxpref.rewards import advantages as advantages_lib
from jaxpref.runtime import distributed, watchdog
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.training import programs, step_rows
from jaxpref.training.batch_maker import BatchRows
from jaxpref.training.inputs import Part
from jaxpref.training.setup import Prepared

# Rounds in a row with equal rewards only, after which the scorer cannot be learned from.
_MOST_EQUAL = 20
_WEIGHTED = ("scored", "steps", "groups")  # rows that an advantage weights
_PROMPTS, _SEEDS, _ORDER = 0x50524F4D, 0x53454544, 0x4F524452  # purposes of random numbers
_log = logging.getLogger(__name__)


class Rounds:
  """The loader of a run that learns from scored samples of its policy."""

  def __init__(self, prepared: Prepared, workdir: Path, guide: Any):
    """Encodes all prompts.

    Args:
      prepared: the run's input, with the encoders' parameters.
      workdir: the run's.
      guide: conditioning that guidance leads away from, on the devices, or None.
    """
    self._prepared, self._directory, self._guide = prepared, workdir / "rounds", guide
    rows, pipeline, mesh = prepared.rows, prepared.pipeline, prepared.mesh
    self._captions = [rows.caption_of(i) for i in range(len(rows))]
    self._cond = encode.encode_prompts(pipeline, mesh, self._captions)
    self._plan: step_rows.Plan | None = None
    if "steps" in prepared.config:
      self._plan = step_rows.plan_steps(prepared.config, pipeline)
    self._tokens = None
    if judge := prepared.judge:  # of candidates
      self._decoder = judge.place(pipeline, mesh)
      self._tokens = judge.tokenize(self._captions)
    else:
      self._decoder = sharding.place_params(pipeline.params["vae"], mesh)
    self._state: dict[str, Any] = {"round": 0, "cursor": 0, "windows": {}}
    self._left: list[tuple[BatchRows, np.ndarray]] = []
    self.metrics: dict[str, float] = {}

  def get_state(self) -> dict[str, Any]:
    """Returns the state between two rounds, as JSON."""
    return self._state

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Sets the state, as from `get_state`."""
    self._state, self._left = dict(state), []

  def close(self) -> None:
    """Frees the round's rows."""
    self._left = []

  @property
  def is_between(self) -> bool:
    """Whether all updates of the round are done, so that the state is whole."""
    return not self._left

  def __next__(self) -> tuple[BatchRows, Any]:
    """Returns the rows of the next update and their batch on the devices."""
    taken, index = self._left.pop(0)
    return taken, sharding.place_batch(taken.part.rows, self._prepared.mesh, index)

  def renew(self, program: programs.Programs, state: Any, base: Any) -> None:
    """Samples and scores a round, if the last one has no updates left.

    Args:
      program: of the run.
      state: the `TrainState`, whose policy or lagging copy samples.
      base: the base's parameters if the policy needs them, else None.

    Raises:
      UserError: a scorer fails, or in many rounds no prompt has images of different rewards.
      DivergedError: an image is not finite.
    """
    if self._left:
      return
    for _ in range(_MOST_EQUAL):
      if self._sample_round(program, state, base):
        return
      _log.warning(
        "round %d teaches nothing: all images of each prompt have equal rewards",
        self._state["round"] - 1,
      )
    raise UserError(
      f"in {_MOST_EQUAL} rounds all images of a prompt had equal rewards, from which nothing "
      "can be learned: choose other rounds.scorers, or a larger rounds.images_per_prompt"
    )

  def _sample_round(self, program: programs.Programs, state: Any, base: Any) -> bool:
    """Samples and scores the next round; returns whether there are rows to learn from."""
    config = self._prepared.config
    number, settings = self._state["round"], config.rounds
    count, images = settings.num_prompts, settings.images_per_prompt
    chosen = take_prompts(self._state["cursor"], count, len(self._captions), config.seed)
    seeds = np.random.default_rng([config.seed, number, _SEEDS])
    # The upper half of the seeds: evaluations use the lower half.
    seed = seeds.integers(2**31, 2**32, size=count * images).astype(np.uint32)
    prompt = np.repeat(chosen, images)
    captions = [self._captions[i] for i in prompt]
    latents, pixels, steps = self._sample(program, state, base, prompt, seed)
    scores = distributed.first(functools.partial(_score, settings.scorers, pixels, captions))
    group = np.repeat(np.arange(count), images)
    by_scorer = np.array(scores)
    advantage, windows = _compare(by_scorer.T, group, captions, settings, self._state)
    reward = by_scorer.T @ np.array(settings.weights)
    self._state = {"round": number + 1, "cursor": self._state["cursor"] + count}
    self._state["windows"] = windows
    made = {
      "prompts": [self._captions[i] for i in chosen],
      "seeds": seed,
      "advantage": advantage,
    }
    made |= dict(zip(settings.scorers, scores, strict=True))
    as_lists = {name: np.asarray(of).tolist() for name, of in made.items()}
    file = self._directory / f"{number}.json"
    distributed.first(lambda: workdir_lib.write_json(file, as_lists))
    self.metrics = _metrics(by_scorer, reward, advantage, group, settings.scorers)
    labels = {"reward": reward, "advantage": advantage}
    if label := self._prepared.loss.label:
      labels |= label(reward)
    kind = self._prepared.loss.needs.rows
    rows = make_rows(kind, latents, labels, group, reward, steps)
    weighted = kind in _WEIGHTED and not self._prepared.loss.label
    if not len(rows["latents"]) or (weighted and not advantage.any()):
      return False
    cond = {name: Gather(of, chosen[rows["group"]]) for name, of in self._cond.items()}
    tree = {"latents": rows["latents"], "cond": cond, "labels": rows["labels"]}
    texts = [row_set.Row((), self._captions[chosen[g]]) for g in rows["group"]]
    part = Part(row_set.collect(texts), tree)
    size = config.train.batch_size
    # The steps of an image stay together, so that an update sees whole trajectories; pairs of
    # candidates are judged one by one.
    together = self._plan and kind != "paths" and not self._prepared.judge
    whole = self._plan.trained if self._plan and together else 1
    trained = size * settings.updates // whole
    order = shuffle(len(texts) // whole, trained, [config.seed, number, _ORDER])
    order = (order[:, None] * whole + np.arange(whole)).ravel()
    self._left = [(BatchRows(part, i), i) for i in order.reshape(-1, size)]
    return True

  def _sample(
    self,
    program: programs.Programs,
    state: Any,
    base: Any,
    prompt: np.ndarray,
    seed: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray, step_rows.Steps | None]:
    """Samples an image for each prompt's number and seed.

    Returns:
      Latents, pixels and, if the loss learns from them, steps of the trajectories.
    """
    config, mesh = self._prepared.config, self._prepared.mesh
    lagging = config.rounds.sampler == "old"
    assert program.sample is not None  # a run with rounds has it
    params = program.adapt(state.policy_copy if lagging else state.params, base)
    cond = {name: Gather(of, prompt) for name, of in self._cond.items()}
    tokens = jax.tree.map(lambda x: x[prompt], self._tokens)
    size = sharding.round_up(min(config.rollout.batch_size or len(seed), len(seed)), mesh)
    eta = picks = starts = None
    if plan := self._plan:
      number = self._state["round"]
      eta, first = step_rows.etas(config, plan, number)
      eta = sharding.replicate(eta, mesh)
      kind, judge = self._prepared.loss.needs.rows, self._prepared.judge
      sides = 2 if kind == "step_pairs" and not judge else 1  # images with equal steps
      picks = step_rows.pick(plan, first, len(seed) // sides, [config.seed, number])
      picks = picks.repeat(sides, axis=0)
      starts = step_rows.start_seeds(config, seed)
    found: list[Any] = []
    for start in range(0, len(seed), size):
      index = np.arange(start, start + size).clip(max=len(seed) - 1)
      host = (cond, tokens, seed, picks, starts)
      texts, words, seeds, taken, begins = sharding.place_batch(host, mesh, index)
      chosen = (eta, taken, begins) if self._plan else None
      sampled = program.sample(
        *(params, self._decoder, texts, self._guide, seeds, chosen),
        *([words] if self._prepared.judge else []),
      )
      real = min(size, len(seed) - start)  # the last batch is padded
      found.append(jax.tree.map(lambda x, n=real: x[:n], sharding.to_host(sampled)))
      watchdog.beat()
    latents, (pixels, finite), steps = jax.tree.map(lambda *of: np.concatenate(of), *found)
    if not (finite.all() and np.isfinite(latents).all()):
      raise DivergedError(
        f"{np.sum(~finite)} of {len(finite)} samples of the policy are not finite: lower "
        "optim.lr or rollout.guidance, or compute in float32; checkpoints are intact"
      )
    return latents, pixels, steps


def make_rows(
  kind: str,
  latents: np.ndarray,
  labels: Mapping[str, np.ndarray],
  group: np.ndarray,
  reward: np.ndarray,
  steps: step_rows.Steps | None = None,
) -> dict[str, Any]:
  """Makes rows of a kind from a round's images.

  'steps' are single steps, those of an image after each other, 'step_pairs' the same step of
  two images of a prompt, that of the larger reward first, or a step's best and worst candidate,
  'paths' pairs of trajectories of a prompt, 'scored' rows are single images, 'groups' all
  images of a prompt, 'pairs' the best and the worst of a prompt's images if their rewards
  differ, and 'experts' the best.

  Args:
    kind: see `losses.Needs`.
    latents: of the images, [P G, C, h, w], those of a prompt after each other.
    labels: of the images by name, [P G].
    group: number of their prompt, int [P G].
    reward: of the images, [P G].
    steps: of the images' trajectories, for rows of the kinds 'steps', 'step_pairs' and
      'paths'.

  Returns:
    'latents' [R, A, C, h, w], of steps and their pairs the inputs and outputs for A, see
    `step_rows.make_arms`, of paths [R, 2, S, 2, C, h, w]; 'group' int [R]; and 'labels' [R], of
    groups [R, G], of pairs of steps and of paths [R, 2], of a pair's common input [R, 1].
  """
  count = int(group[-1]) + 1
  single = {name: np.asarray(of, np.float32) for name, of in labels.items()}
  if kind in ("paths", "step_pairs"):
    assert steps is not None  # such a run keeps them
    of_candidates = "better" in steps.labels
    return (
      _rows_of_candidates(single, group, steps)
      if of_candidates
      else _rows_of_pairs(kind, single, group, reward, steps)
    )
  if steps is not None:
    chosen = steps.latents.shape[1]
    flat = jax.tree.map(lambda of: of.reshape(-1, *of.shape[2:]), steps)
    repeated = {name: np.repeat(of, chosen) for name, of in single.items()}
    by_step = {"group": np.repeat(group, chosen), "labels": repeated | flat.labels}
    return {"latents": flat.latents, **by_step}
  if kind == "scored":
    return {"latents": latents[:, None], "group": group, "labels": single}
  if kind == "groups":
    by_group = {name: of.reshape(count, -1) for name, of in single.items()}
    whole = latents.reshape(count, -1, *latents.shape[1:])
    return {"latents": whole, "group": np.arange(count), "labels": by_group}
  best, worst, apart = advantages_lib.best_and_worst(reward, group)
  if kind == "experts":
    return {"latents": latents[best][:, None], "group": np.arange(count), "labels": {}}
  kept = np.flatnonzero(apart > 0)
  pairs = np.stack([latents[best[kept]], latents[worst[kept]]], axis=1)
  return {"latents": pairs, "group": kept, "labels": {}}


def _rows_of_pairs(
  kind: str,
  labels: Mapping[str, np.ndarray],
  group: np.ndarray,
  reward: np.ndarray,
  steps: step_rows.Steps,
) -> dict[str, Any]:
  """Makes rows of pairs of trajectories, whose sides are images of one prompt."""

  def by_two(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 2, *x.shape[1:])

  paths, both = jax.tree.map(by_two, steps), {name: by_two(of) for name, of in labels.items()}
  if kind == "paths":
    return {"latents": paths.latents, "group": group[::2], "labels": both | paths.labels}
  better_first = np.argsort(-by_two(reward), axis=1, kind="stable")
  count = paths.latents.shape[2]

  def sort(x: np.ndarray) -> np.ndarray:
    return x[np.arange(len(x))[:, None], better_first]

  def by_step(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(sort(x), 1, 2).reshape(-1, 2, *x.shape[3:])

  repeated = {name: np.repeat(sort(of), count, axis=0) for name, of in both.items()}
  both_inputs_first = np.swapaxes(by_step(paths.latents), 1, 2)
  return {
    "latents": both_inputs_first.reshape(-1, 4, *both_inputs_first.shape[3:]),
    "group": np.repeat(group[::2], count),
    "labels": repeated | jax.tree.map(by_step, paths.labels),
  }


def _rows_of_candidates(
  labels: Mapping[str, np.ndarray], group: np.ndarray, steps: step_rows.Steps
) -> dict[str, Any]:
  """Makes rows of the best and the worst candidate of each step, see `step_candidates`."""
  count, inputs = steps.latents.shape[1], steps.latents.shape[2] - 2
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
  of_step = {n: np.stack([flat.labels[n]] * inputs, axis=1) for n in step_rows.LABELS}
  sides = np.stack([flat.labels["better"], flat.labels["worse"]], axis=1)
  advantage = np.repeat(labels["advantage"], count)
  both = {"reward": sides, "advantage": np.stack([advantage, advantage], axis=1)}
  return {
    "latents": flat.latents,
    "group": np.repeat(group, count),
    "labels": both | of_step,
  }


def shuffle(rows: int, count: int, seed: Sequence[int]) -> np.ndarray:
  """Returns `count` row numbers: all rows in a random order, then in another one, and so on."""
  generator = np.random.default_rng(seed)
  passes = [generator.permutation(rows) for _ in range(-(-count // rows))]
  return np.concatenate(passes)[:count]


def take_prompts(cursor: int, count: int, total: int, seed: int) -> np.ndarray:
  """Returns the next `count` of `total` prompts; each epoch has all of them in a new order."""

  @functools.cache
  def order(epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, _PROMPTS]).permutation(total)

  return np.array([order(i // total)[i % total] for i in range(cursor, cursor + count)])


def _score(
  names: Sequence[str], pixels: np.ndarray, captions: Sequence[str]
) -> list[list[float]]:
  """Returns the scores of each scorer."""
  found: Mapping[str, tuple[str, Callable]] = scorers.load_scorers(names)
  return [
    scorers.score(name, function, pixels, captions).tolist()
    for name, (_, function) in found.items()
  ]


def _compare(
  scores: np.ndarray,
  group: np.ndarray,
  captions: Sequence[str],
  settings: ConfigDict,
  state: Mapping[str, Any],
) -> tuple[np.ndarray, dict[Any, list[float]]]:
  """Returns advantages [N] for scores [N, K], and the new windows."""
  clip = settings.clip or None
  if settings.window:
    return advantages_lib.windowed_advantages(
      scores @ np.array(settings.weights),
      captions,
      state["windows"],
      size=settings.window,
      least=min(settings.window_least, settings.window),
      eps=settings.eps,
      clip=clip,
    )
  advantage = advantages_lib.sum_advantages(
    *(scores, settings.weights, group),
    scale=settings.scale,
    ddof=settings.ddof,
    eps=settings.eps,
    clip=clip,
  )
  return advantage, {}


def _metrics(
  scores: np.ndarray,
  reward: np.ndarray,
  advantage: np.ndarray,
  group: np.ndarray,
  names: Sequence[str],
) -> dict[str, float]:
  _, _, apart = advantages_lib.best_and_worst(reward, group)
  found = {
    "reward/mean": reward.mean(),
    "reward/std": reward.std(),
    "reward/spread": apart.mean(),
    "reward/equal_groups": (apart == 0).mean(),
    "reward/advantage": np.abs(advantage).mean(),
    **{f"reward/{name}": of.mean() for name, of in zip(names, scores, strict=True)},
  }
  return {name: float(value) for name, value in found.items()}
