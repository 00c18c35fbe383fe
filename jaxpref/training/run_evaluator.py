"""Evaluations during a run, its best checkpoint, and the report at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref import base_config, scorers
from jaxpref.data.built_rows import StoredImages
from jaxpref.evaluation import best_checkpoint, evaluate
from jaxpref.runtime import checkpoint_files, distributed, jax_setup
from jaxpref.runtime.checkpoint import Checkpointer
from jaxpref.training import alarms, load_run
from jaxpref.training.setup import Prepared, rows_kind


class RunEvaluator:
  """Evaluates a run's EMA weights against its base.

  Args:
    prepared: the run's input.
    workdir: the run's.
    ckptr: its checkpoints; the best one is kept however old it gets.
    known: the base's images under 'base' if another run has sampled them already.
  """

  def __init__(
    self,
    prepared: Prepared,
    workdir: Path,
    ckptr: Checkpointer,
    known: Mapping[str, np.ndarray] | None = None,
  ):
    self._prepared, self._workdir, self._ckptr = prepared, workdir, ckptr
    self._images = dict(known or {})  # the base's, sampled once
    self._settings = best_checkpoint.settings_of(
      prepared.config, prepared.prompts, prepared.scorers
    )

  def is_due(self, done: int) -> bool:
    """Tells whether an evaluation during the run follows after `done` updates."""
    return best_checkpoint.is_due(self._prepared.config, done)

  def evaluate(self, models: Mapping[str, Any], done: int) -> None:
    """Evaluates 'base' and 'tuned' after `done` updates and updates the best checkpoint.

    An evaluation that an interrupted run has finished is not repeated, except the last.
    """
    prepared, config = self._prepared, self._prepared.config
    directory = self._workdir / "evaluation" / str(done)
    last = done == config.train.num_updates
    if last or not distributed.first(
      lambda: best_checkpoint.is_made(directory, self._settings)
    ):
      images = evaluate.evaluate(
        prepared.pipeline,
        models,
        prepared.prompts,
        config.evaluate,
        scorer_names=prepared.scorers,
        mesh=prepared.mesh,
        directory=directory,
        prefix=config.data.good_prefix,
        improve=config.improve if prepared.pipeline.is_improver else None,
        known=self._images,
        selected_by=self._selected_by(),
      )
      self._images |= {"base": images["base"]}
      distributed.first(lambda: best_checkpoint.write_settings(directory, self._settings))
    self._ckptr.wait()  # only a finished checkpoint can be the best
    self.keep_best()

  def _selected_by(self) -> tuple[str, ...]:
    """Returns the scorers that judge this run with a bias, see `load_run.learned_from`."""
    learned = load_run.learned_from(self._prepared.config)
    return tuple(scorers.with_weights_of(self._prepared.scorers, learned))

  def keep_best(self) -> None:
    """Finds the best evaluated checkpoint, if there are several, and protects it."""
    if not self._prepared.config.evaluate.every:
      return

    def find() -> int | None:
      if (best := self._find_best()) is None:
        return None
      best_checkpoint.write(self._workdir, best)
      print(f"best so far by {best.scorer}: update {best.update}, {best.mean:.4f}", flush=True)
      return best.update

    if (best := distributed.first(find)) is not None:
      self._ckptr.protect(best)

  def write_report(self, wall_time: str) -> None:
    """Writes the run's results and report; on process 0."""
    prepared, config = self._prepared, self._prepared.config
    names = {"start": config.model.start, "base": config.model.path}
    stored = prepared.rows.images
    facts = {
      "updates": config.train.num_updates,
      **({"reference": names[prepared.reference]} if prepared.reference else {}),
      "training rows": f"{len(prepared.rows)} {rows_kind(config, prepared.loss)}",
      **(stored.table.about if isinstance(stored, StoredImages) else {}),
      **prepared.data.words(),
      "seed": config.seed,
      **jax_setup.facts(),
      "wall time": wall_time,
    }
    if config.evaluate.every and (best := self._find_best()):
      facts["best checkpoint"] = f"update {best.update} by {best.scorer}, {best.mean:.4f}"
    evaluate.write_report(
      self._workdir,
      self._workdir / "evaluation" / str(config.train.num_updates),
      config,
      facts,
      held_out=not prepared.rows.has_caption_in(prepared.prompts),
      improves=prepared.pipeline.is_improver,
      trained=base_config.trained_scorers(config),
      role=alarms.role_of(config),
    )

  def _find_best(self) -> best_checkpoint.Best | None:
    saved = checkpoint_files.steps(self._ckptr.directory)
    return best_checkpoint.find(self._workdir, self._settings, saved)
