"""The best checkpoint of a run, by the evaluations of its checkpoints."""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref.errors import DamagedError, UserError
from jaxpref.evaluation import evaluate
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.runtime.paths import number_of
from jaxpref.scorers import load_scorers

FILE, _SETTINGS = "best.json", "settings.json"
_COMPARED = (
  "images_per_prompt",
  "num_steps",
  "guidance",
  "seed",
)  # fields of `evaluate` that evaluations must share


class Best(NamedTuple):
  """The best checkpoint of a run.

  Attributes:
    update: its update.
    scorer: the scorer that decides, with its version.
    mean: the tuned model's mean score.
  """

  update: int
  scorer: str
  mean: float


def is_due(config: ConfigDict, update: int) -> bool:
  """Checks whether the checkpoint after `update` is evaluated during training."""
  every = config.evaluate.every * config.train.updates_per_iteration
  return bool(every and update and update % every == 0 and update < config.train.num_updates)


def settings_of(
  config: ConfigDict, prompts: Sequence[str], scorers: Sequence[str]
) -> dict[str, Any]:
  """Returns the settings and scorer versions that comparable evaluations share."""
  own = {name: value for name, value in config.evaluate.items() if name in _COMPARED}
  own["improve"] = config.improve.to_dict() if "improve" in config else {}
  versions = {name: version for name, (version, _) in load_scorers(scorers).items()}
  found = {**own, "prompts": list(prompts), "scorers": list(versions.items())}
  return json.loads(json.dumps(found))


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
  """Records the settings of an evaluation; its presence marks it as complete."""
  workdir_lib.write_json(directory / _SETTINGS, settings)


def is_made(directory: Path, settings: dict[str, Any]) -> bool:
  """Checks whether the directory has a complete evaluation with these settings."""
  try:
    workdir_lib.read_json(directory / _SETTINGS, lambda made: made == settings)
    evaluate.read_results(directory)
  except DamagedError:
    return False  # the caller then evaluates again
  return True


def find(workdir: Path, settings: dict[str, Any], saved: Collection[int]) -> Best | None:
  """Finds the best of the saved checkpoints with comparable evaluations.

  Args:
    workdir: the run's workdir.
    settings: from `settings_of`; their first scorer decides.
    saved: updates with a saved checkpoint.

  Returns:
    The best checkpoint; None without a scorer or an evaluation. The earliest of equal ones.
  """
  if not settings["scorers"]:
    return None
  found, decides = [], "-".join(settings["scorers"][0])
  for directory in (workdir / "evaluation").glob("*"):
    update = number_of(directory.name)
    if update is None or update not in saved or not is_made(directory, settings):
      continue
    if entry := evaluate.read_results(directory).get(decides):
      found.append(Best(update, decides, entry["tuned"]["mean"]))
  # Of equal scores the earliest, which has moved least from the base.
  return max(found, key=lambda b: (b.mean, -b.update), default=None)


def write(workdir: Path, best: Best) -> None:
  """Records the best checkpoint in the workdir, for `read`."""
  workdir_lib.write_json(workdir / FILE, best._asdict())


def read(workdir: Path) -> Best:
  """Reads the recorded best checkpoint.

  Raises:
    UserError: the run has no evaluation with scores, or the record is damaged.
  """
  if not (workdir / FILE).exists():
    raise UserError(
      f"{workdir} has no best checkpoint: set evaluate.every and evaluate.scorers to score "
      "checkpoints during training"
    )
  return Best(**workdir_lib.read_json(workdir / FILE, _is_best))


def _is_best(value: Any) -> bool:
  if not isinstance(value, dict) or value.keys() != set(Best._fields):
    return False
  update, scorer, mean = (value[name] for name in Best._fields)
  numbers = type(update) is int and isinstance(mean, int | float) and math.isfinite(mean)
  return numbers and isinstance(scorer, str)
