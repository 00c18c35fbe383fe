"""Which of a run's checkpoints is best, by the evaluations made of them."""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref.errors import DamagedError, UserError
from jaxpref.evaluation import evaluate
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.runtime.paths import number_of
from jaxpref.scorers import load_scorers

FILE, _SETTINGS = "best.json", "settings.json"
_COMPARED = ("images_per_prompt", "num_steps", "guidance", "seed")  # of the section evaluate


class Best(NamedTuple):
  """A checkpoint: its update, and the tuned model's mean score there by which scorer."""

  update: int
  scorer: str
  mean: float


def is_due(config: Any, update: int) -> bool:
  """Whether the checkpoint after so many updates is to be evaluated on the way."""
  every = config.evaluate.every * config.train.updates_per_iteration
  return bool(every and update and update % every == 0 and update < config.train.num_updates)


def settings_of(config: Any, prompts: Sequence[str], scorers: Sequence[str]) -> dict[str, Any]:
  """What evaluations must have in common to be compared, with the scorers' versions."""
  own = {name: value for name, value in config.evaluate.items() if name in _COMPARED}
  own["improve"] = config.improve.to_dict() if "improve" in config else {}
  versions = {name: version for name, (version, _) in load_scorers(scorers).items()}
  found = {**own, "prompts": list(prompts), "scorers": list(versions.items())}
  return json.loads(json.dumps(found))


def write_settings(directory: Path, settings: dict[str, Any]) -> None:
  """Says, last of all, how an evaluation was made."""
  workdir_lib.write_json(directory / _SETTINGS, settings)


def is_made(directory: Path, settings: dict[str, Any]) -> bool:
  """Whether the directory holds an evaluation of these settings."""
  try:
    workdir_lib.read_json(directory / _SETTINGS, lambda made: made == settings)
    evaluate.read_results(directory)
  except DamagedError:
    return False  # it is made again
  return True


def find(workdir: Path, settings: dict[str, Any], saved: Collection[int]) -> Best | None:
  """The best of the checkpoints that are still there and were evaluated alike.

  Args:
    workdir: of the run.
    settings: from `settings_of`; the first scorer in them decides, without one nothing is
      best.
    saved: the updates whose checkpoints are still there.
  """
  found = []
  for directory in (workdir / "evaluation").glob("*"):
    update = number_of(directory.name)
    if update is None or update not in saved or not is_made(directory, settings):
      continue
    for scorer, entry in evaluate.read_results(directory).items():
      if scorer.rpartition("-")[::2] in map(tuple, settings["scorers"][:1]):
        found.append(Best(update, scorer, entry["tuned"]["mean"]))
  # The earliest of equals: it has left the base least.
  return max(found, key=lambda b: (b.mean, -b.update), default=None)


def write(workdir: Path, best: Best) -> None:
  """Notes it down, for `read`."""
  workdir_lib.write_json(workdir / FILE, best._asdict())


def read(workdir: Path) -> Best:
  """What was noted down.

  Raises:
    UserError: nothing, for the run made no evaluation with scores, or it is damaged.
  """
  if not (workdir / FILE).exists():
    raise UserError(
      f"{workdir} has no best checkpoint: none was evaluated on the way, with a scorer "
      "(evaluate.every)"
    )
  return Best(**workdir_lib.read_json(workdir / FILE, _is_best))


def _is_best(value: Any) -> bool:
  if not isinstance(value, dict) or value.keys() != set(Best._fields):
    return False
  update, scorer, mean = (value[name] for name in Best._fields)
  numbers = type(update) is int and isinstance(mean, int | float) and math.isfinite(mean)
  return numbers and isinstance(scorer, str)
