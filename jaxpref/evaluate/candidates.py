"""The models of a comparison, and the images that each generates."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from jaxpref.errors import UserError
from jaxpref.evaluation import image_files
from jaxpref.evaluation.image_files import ImageTask

IMAGES = "images"
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


class Candidate(NamedTuple):
  """A model to compare.

  Attributes:
    name: its name in the tables, also of its folder of images.
    model: a run's workdir, a pipeline's directory, a Hub id, or a bundled model.
    improves: name of the model whose images it improves; '' for a model of prompts.
  """

  name: str
  model: str
  improves: str = ""


def parse(models: str, improve: str) -> list[Candidate]:
  """Parses --models=NAME=MODEL,... and --improve=NAME:OTHER,...

  Raises:
    UserError: a name is missing, impossible as a folder's, or occurs twice.
  """
  improves = {}
  for part in filter(None, improve.split(",")):
    name, colon, other = part.partition(":")
    if not (name and colon and other):
      raise UserError(f"--improve={part}: give it as IMPROVER:OTHER, two names of --models")
    improves[name] = other
  found = []
  for part in models.split(","):
    name, equals, model = part.partition("=")
    if not (name and equals and model):
      raise UserError(f"--models: {part!r} is not NAME=MODEL, such as base=runwayml/sd15")
    if not _NAME.fullmatch(name):
      raise UserError(
        f"--models: the name {name!r} becomes a folder's: use letters, digits, '-', '_', '.' "
        "and, for a training run, '/', as in dro/seed0"
      )
    found.append(Candidate(name, model, improves.pop(name, "")))
  names = [candidate.name for candidate in found]
  if twice := next((name for name in names if names.count(name) > 1), ""):
    raise UserError(f"--models names {twice!r} twice")
  if unknown := next(iter(improves), ""):
    raise UserError(f"--improve: {unknown!r} is not a name of --models")
  for candidate in found:
    others = {c.name for c in found if not c.improves}
    if candidate.improves and candidate.improves not in others:
      raise UserError(
        f"--improve={candidate.name}:{candidate.improves}: {candidate.improves!r} is not a "
        "model of --models that generates images from prompts"
      )
  return found


def list_tasks(
  candidate: Candidate,
  images: pd.DataFrame,
  flags: argparse.Namespace,
  *,
  pipeline: Any,
  prefix: str,
) -> list[ImageTask]:
  """Lists the tasks that generate a model's images, in their order.

  Args:
    candidate: the model.
    images: of the model, see `score_table.list_images`.
    flags: of the program.
    pipeline: the loaded model.
    prefix: text before each prompt of this model.
  """
  shared = image_files.shared_settings(flags, pipeline, candidate.model)
  if candidate.improves:
    shared |= {
      "guidance": flags.improve_guidance,
      "image_guidance": flags.image_guidance,
      "improved": candidate.improves,
    }
  tasks = []
  for file, prompt, seed in zip(images["file"], images["prompt"], images["seed"], strict=True):
    # An improver's noise must differ from the noise of its input image.
    used = seed ^ 2**31 if candidate.improves else seed
    tasks.append(ImageTask(file, {**shared, "prompt": prefix + prompt, "seed": used}))
  return tasks


def generate(
  candidate: Candidate,
  images: pd.DataFrame,
  flags: argparse.Namespace,
  mesh: Any,
  *,
  samplers: dict[str, Callable],
) -> None:
  """Generates the missing images of a model into `OUT/images/NAME`.

  Images with non-finite pixels are not written.

  Args:
    candidate: the model.
    images: of the model, those of this process's share.
    flags: of the program.
    mesh: devices that share a batch.
    samplers: those of the models before. Models that differ only in the denoiser's weights
      share one, so that it is compiled once.

  Raises:
    UserError: the model cannot be read, or `OUT` has images with other settings.
  """
  from jaxpref.runtime import progress  # noqa: PLC0415
  from jaxpref.training import load_run  # noqa: PLC0415

  pipeline = _load(candidate, flags, mesh)
  tasks = list_tasks(
    candidate, images, flags, pipeline=pipeline, prefix=load_run.prompt_prefix(candidate.model)
  )
  missing = [t for t in tasks if not image_files.is_generated(t.file, t.settings)]
  if not missing:
    return
  key = _sampler_key(pipeline, tasks[0].settings)
  if key not in samplers:
    samplers[key] = image_files.make_sampler(
      pipeline, mesh, tasks[0].settings, flags.batch_size
    )
  done = len(tasks) - len(missing)
  with progress.progress_bar(
    total=len(tasks), initial=done, desc=f"images of {candidate.name}", unit="image"
  ) as bar:
    # In parts, since the images to improve of a part are held in memory.
    for start in range(0, len(missing), 64 * flags.batch_size):
      part = missing[start : start + 64 * flags.batch_size]
      if candidate.improves:
        part = _with_inputs(part, flags.out / IMAGES / candidate.improves)
      if part:
        image_files.generate_images(
          *(pipeline, mesh, samplers[key], part), batch_size=flags.batch_size, bar=bar
        )


def _sampler_key(pipeline: Any, settings: Mapping[str, Any]) -> str:
  """Returns a text that is equal for models that can share a sampler."""
  own = ("prompt", "seed", "model", "weights", "improved")
  fixed = {name: value for name, value in settings.items() if name not in own}
  parts = (fixed, pipeline.configs, pipeline.part_digests)
  return json.dumps(parts, sort_keys=True, default=str)


def _load(candidate: Candidate, flags: argparse.Namespace, mesh: Any) -> Any:
  import jax.numpy as jnp  # noqa: PLC0415

  from jaxpref.training import load_run  # noqa: PLC0415

  is_run = load_run.is_run(candidate.model)
  try:
    pipeline = load_run.load(
      candidate.model,
      ema=flags.ema or not is_run,
      step=flags.step if is_run else None,
      dtype=jnp.dtype(flags.dtype),
      mesh=mesh,
    )
  except UserError as error:
    raise UserError(f"--models: {candidate.name}: {error}") from error
  if pipeline.is_improver and not candidate.improves:
    raise UserError(
      f"--models: {candidate.name} is an improver: --improve={candidate.name}:OTHER says whose "
      "images it improves"
    )
  if candidate.improves and not pipeline.is_improver:
    raise UserError(f"--improve: {candidate.name} is not an improver")
  return pipeline


def _with_inputs(tasks: Sequence[ImageTask], folder: Path) -> list[ImageTask]:
  """Adds the images to improve; leaves out those that the other model could not generate."""
  from jaxpref.data import images  # noqa: PLC0415

  inputs: Mapping[str, Path] = {t.file.name: folder / t.file.name for t in tasks}
  return [
    t._replace(image=images.decode(inputs[t.file.name]))
    for t in tasks
    if inputs[t.file.name].exists()
  ]
