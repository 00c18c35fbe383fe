"""Which of a run's checkpoints is best, by the evaluations made of them."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref import workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate
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
    made = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return False
  return made == settings and (directory / evaluate.RESULTS).exists()


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
    update = directory.name
    if not (update.isdecimal() and int(update) in saved):
      continue
    if not is_made(directory, settings):
      continue
    results = json.loads((directory / evaluate.RESULTS).read_text(encoding="utf-8"))
    for scorer, entry in results.items():
      if scorer.rpartition("-")[::2] in map(tuple, settings["scorers"][:1]):
        found.append(Best(int(update), scorer, entry["tuned"]["mean"]))
  # The earliest of equals: it has left the base least.
  return max(found, key=lambda b: (b.mean, -b.update), default=None)


def write(workdir: Path, best: Best) -> None:
  """Notes it down, for `read`."""
  workdir_lib.write_json(workdir / FILE, best._asdict())


def read(workdir: Path) -> Best:
  """What was noted down.

  Raises:
    UserError: nothing, for the run made no evaluation with scores.
  """
  try:
    return Best(**json.loads((workdir / FILE).read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f"{workdir} has no best checkpoint: none was evaluated on the way, with a scorer "
      "(evaluate.every)"
    ) from error
