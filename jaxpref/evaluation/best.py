"""Which of a run's checkpoints is best, by the evaluations made of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxpref import workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import evaluate

FILE = "best.json"


class Best(NamedTuple):
  """A checkpoint: its update, and the tuned model's mean score there by which scorer."""

  update: int
  scorer: str
  mean: float


def is_due(config: Any, update: int) -> bool:
  """Whether the checkpoint after so many updates is to be evaluated on the way."""
  every = config.evaluate.every * config.train.updates_per_iteration
  return bool(every and update and update % every == 0 and update < config.train.num_updates)


def find(workdir: Path, scorers: Any) -> Best | None:
  """The best of the evaluated checkpoints that are still there, by the first scorer.

  Args:
    workdir: of the run.
    scorers: names, as in the configuration; of none nothing is best.
  """
  found = []
  for file in (workdir / "evaluation").glob(f"*/{evaluate.RESULTS}"):
    update = file.parent.name
    if not (update.isdecimal() and (workdir / "checkpoints" / update).exists()):
      continue
    for scorer, entry in json.loads(file.read_text(encoding="utf-8")).items():
      if scorer.rpartition("-")[0] in scorers[:1]:
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
