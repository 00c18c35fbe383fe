"""Checks of the section `rounds`, before a run writes anything."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from jaxpref import base_config, scorers
from jaxpref.errors import UserError
from jaxpref.losses import Loss

KINDS = ("scored", "steps", "step_pairs", "paths", "groups", "pairs", "experts")


def check(config: ConfigDict, loss: Loss) -> None:
  """Refuses settings of rounds that do not fit each other.

  Args:
    config: of the run.
    loss: of the run.

  Raises:
    UserError: two settings contradict each other, or the loss.
  """
  needs = loss.needs
  if "rounds" not in config:
    if needs.old or needs.scored:
      raise UserError(
        f"loss {config.loss.name!r} learns from scored samples: its config file must call "
        "base_config.rounds(c)"
      )
    return
  settings, kind = config.rounds, needs.rows
  if kind not in KINDS or needs.rollout or needs.arms:
    raise UserError(
      f"rounds make rows of the kinds {', '.join(KINDS)}, and loss {config.loss.name!r} learns "
      f"from {kind}"
    )
  check_weights(settings, "rounds")
  _check_comparison(config, loss)
  if needs.of_steps != ("steps" in config):
    raise UserError(
      f"loss {config.loss.name!r} learns from {kind}: the section steps is for losses that "
      "learn from steps, whose config files call base_config.steps(c)"
    )
  if not needs.of_steps:
    check_rows(config, settings.images_per_prompt if kind == "scored" else 1)
  if config.train.num_updates % settings.updates:
    raise UserError(
      f"train.num_updates = {config.train.num_updates} must be a multiple of rounds.updates = "
      f"{settings.updates}, since a run ends with a whole round"
    )
  if config.evaluate.every and config.train.updates_per_iteration % settings.updates:
    raise UserError(
      f"evaluate.every needs checkpoints between rounds: train.updates_per_iteration = "
      f"{config.train.updates_per_iteration} must be a multiple of rounds.updates = "
      f"{settings.updates}"
    )
  check_unused(config, "rounds")
  if settings.sampler == "old" and not needs.old:
    raise UserError(
      f"rounds.sampler = 'old', but loss {config.loss.name!r} keeps no average of the policy"
    )


def _check_comparison(config: ConfigDict, loss: Loss) -> None:
  """Refuses rewards that are compared with nothing, or with what other settings contradict."""
  settings = config.rounds
  # A loss with labels of its own weights images by rewards; candidates are compared by a judge.
  compares = not loss.label and not base_config.have_candidates(config)
  if settings.images_per_prompt == 1 and not settings.window and compares:
    raise UserError(
      "rounds.images_per_prompt = 1 leaves a prompt's image nothing to be compared with: raise "
      "it, or set rounds.window"
    )
  one = len(settings.scorers) == 1 and settings.scale == "group" and not settings.ddof
  if settings.window and not one:
    raise UserError(
      "rounds.window compares a reward with the last ones of its prompt, and divides by their "
      "deviation: it takes one scorer, rounds.scale='group' and rounds.ddof=0"
    )


def check_weights(settings: ConfigDict, section: str) -> None:
  """Refuses scorers without a weight each.

  Args:
    settings: the configuration's section.
    section: its name.

  Raises:
    UserError: their numbers differ, or are 0.
  """
  if len(settings.scorers) != len(settings.weights) or not settings.scorers:
    raise UserError(
      f"{section}.scorers and {section}.weights need one entry for each scorer (got "
      f"{len(settings.scorers)} and {len(settings.weights)})"
    )


def check_unused(config: ConfigDict, what: str) -> None:
  """Refuses settings of images where a run samples its own.

  Args:
    config: of the run.
    what: samples, for the message.

  Raises:
    UserError: a setting has no effect.
  """
  usual = {
    "data.latents": "mode",
    "data.crop": "center",
    "data.flip": False,
    "data.noise_draws": 0,
    "data.buckets": False,
    "data.original_sizes": False,
    "data.cache": "auto",
    "rollout.refresh_every": 1,
  }
  for name, value in usual.items():
    section, field = name.split(".")
    if (given := config[section][field]) != value:
      raise UserError(f"{name} = {given!r} does not apply to {what}: their images are samples")


def check_rows(config: ConfigDict, of_prompt: int) -> None:
  """Refuses rounds whose updates do not use every row.

  Args:
    config: of the run.
    of_prompt: number of a prompt's rows.

  Raises:
    UserError: rows would be left out.
  """
  rows = config.rounds.num_prompts * of_prompt
  trained = config.rounds.updates * config.train.batch_size
  if trained < rows:
    raise UserError(
      f"a round has {rows} rows, and its rounds.updates x train.batch_size = {trained} rows "
      "would leave some out: raise one of these, or lower rounds.num_prompts"
    )


def check_scorers(settings: ConfigDict, captions: Sequence[str]) -> None:
  """Refuses scorers that are unknown or cannot judge a prompt.

  Args:
    settings: the configuration's section `rounds` or `pathwise`.
    captions: the prompts.

  Raises:
    UserError: a scorer is unknown, or cannot judge one of the prompts.
  """
  for name in settings.scorers:
    scorers.load_scorers([name])
    scorers.categorize([name], captions)
