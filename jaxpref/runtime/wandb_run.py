"""Metrics of a run in Weights & Biases, which may fail without any harm to the run."""

import importlib
import importlib.util
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.runtime import workdir as workdir_lib

FILE = "wandb.json"  # the project and the id of the run, so that a resumed run continues it
_WAIT = 60.0  # seconds to wait for the service at the start and at the end

_log = logging.getLogger(__name__)


class WandbRun:
  """A run in Weights & Biases; after its first failure it only warns once and writes nothing.

  Args:
    config: the resolved configuration; `train.wandb` is the project.
    workdir: the run's directory. It keeps the id, and W&B's own files in `wandb/`.
  """

  def __init__(self, config: ConfigDict, workdir: Path):
    self._run: Any = None
    name = _id_of(config.train.wandb, workdir)
    self._try(lambda: self._open(config, workdir, name))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars of an update; those that are not finite are left out.

    W&B drops steps that it already has. A resumed run repeats updates with the same values.
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if self._run is not None:
      self._try(lambda: self._run.log(finite, step=step))

  def close(self) -> None:
    """Finishes the run; waits at most a minute for values that are not sent yet."""
    if self._run is not None:
      self._try(self._run.finish)

  def _open(self, config: ConfigDict, workdir: Path, name: str) -> None:
    wandb = importlib.import_module("wandb")
    self._run = wandb.init(
      project=config.train.wandb,
      id=name,
      resume="allow",
      name=config.name,
      notes=str(workdir),
      config=config.to_dict(),
      dir=str(workdir),
      settings=wandb.Settings(
        console="off",  # the progress line is not part of the metrics
        init_timeout=_WAIT,
        login_timeout=_WAIT,
        finish_timeout=_WAIT,
      ),
    )

  def _try(self, job: Callable[[], None]) -> None:
    try:
      job()
    except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
      self._run = None
      reason = " ".join(str(error).split()) or type(error).__name__
      _log.warning("no metrics to Weights & Biases from here on: %s", reason)


def check_installed(project: str) -> None:
  """Checks that W&B can be imported if a project is named.

  Raises:
    UserError: it is not installed.
  """
  if project and importlib.util.find_spec("wandb") is None:
    raise UserError(
      f"train.wandb is {project!r}, but wandb is not installed: pip install 'jaxpref[wandb]'"
    )


def _id_of(project: str, workdir: Path) -> str:
  """Returns the id that the workdir keeps for a project, a new one the first time."""
  file = workdir / FILE
  if file.exists():
    found = workdir_lib.read_json(file, _is_id)
    if found["project"] == project:
      return found["id"]
  name = secrets.token_hex(8)
  workdir_lib.write_json(file, {"project": project, "id": name})
  return name


def _is_id(found: Any) -> bool:
  return isinstance(found, dict) and all(type(found.get(x)) is str for x in ("project", "id"))
