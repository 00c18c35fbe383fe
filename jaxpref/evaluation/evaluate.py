"""Comparison of the tuned model with its base on the same prompts and noise."""

import collections
import functools
import io
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from jaxpref import scorers
from jaxpref.data.bad_rows import BadRow
from jaxpref.data.encode import encode_images, encode_prompts
from jaxpref.data.images import decode
from jaxpref.errors import DamagedError, UserError, first_line
from jaxpref.evaluation import (
  comparison_text,
  diversity,
  image_grid,
  panels,
  report,
  reward_hacking,
  sampling,
  score_rows,
  score_text,
  statistics,
)
from jaxpref.models import text
from jaxpref.models.pipeline import Pipeline
from jaxpref.runtime import distributed, metrics, progress, watchdog
from jaxpref.runtime import workdir as workdir_lib

RESULTS = "results.json"
_SCORES, _EXAMPLES, _DIVERSITY = "scores.parquet", "examples.json", "diversity.json"
_FEATURES = "pixels"  # what diversity is measured by
_GRID_PAIRS = 12
_MOST_IMAGES = 1_000_000  # per model; all of them are held in memory
_log = logging.getLogger(__name__)


def check_count(num_prompts: int, images_per_prompt: int) -> None:
  """Refuses more images than fit in memory.

  Raises:
    UserError: the number of images per model is above the limit.
  """
  if (count := num_prompts * images_per_prompt) > _MOST_IMAGES:
    raise UserError(
      f"{num_prompts} prompts times evaluate.images_per_prompt = {images_per_prompt} gives "
      f"{count:,} images; at most {_MOST_IMAGES:,} are possible"
    )


def usable_scorers(names: Sequence[str], prompts: Sequence[str]) -> tuple[str, ...]:
  """Returns the scorers that can judge images of these prompts; warns about the others.

  Args:
    names: the configured scorers.
    prompts: of the evaluation.

  Raises:
    UserError: a name is unknown.
  """
  scorers.load_scorers(names)
  usable, refused = [], collections.defaultdict(list)
  for name in names:
    try:
      scorers.categorize([name], prompts)
      usable.append(name)
    except UserError as error:
      refused[str(error)].append(name)
  for reason, left_out in refused.items():
    _log.warning("not scored with %s: %s", ", ".join(left_out), reason)
  return tuple(usable)


def evaluate(
  pipeline: Pipeline,
  models: Mapping[str, Any],
  prompts: Sequence[str],
  settings: ConfigDict,
  *,
  scorer_names: Sequence[str],
  mesh: Mesh,
  directory: Path,
  prefix: str = "",
  improve: ConfigDict | None = None,
  known: Mapping[str, np.ndarray] | None = None,
  selected_by: Collection[str] = (),
) -> dict[str, np.ndarray]:
  """Generates images of both models, scores them and compares the scores.

  Args:
    pipeline: everything that both models share.
    models: denoiser parameters of 'base' and 'tuned'.
    prompts: distinct prompts.
    settings: the configuration's `evaluate` section.
    scorer_names: names of the scorers; may be empty.
    mesh: devices that share a batch.
    directory: gets images/, scores.parquet, diversity.json, examples.json, grid.png and, last,
      results.json, which `write_report` reads.
    prefix: text that is put before each prompt of the tuned model.
    improve: the configuration's `improve` section if the tuned model is an improver; its input
      images are then the base's images.
    known: images by model of an earlier evaluation with equal settings, which are reused.
    selected_by: scorers that had a part in the training, see `statistics.compare`.

  Returns:
    The images by model, uint8 [N, H, W, 3]; images of a prompt follow each other.
  """
  repeats = settings.images_per_prompt
  seeds = sampling.seeds_of(len(prompts), repeats, seed=settings.seed)
  images = dict(known or {})
  missing = {model: params for model, params in models.items() if model not in images}
  images |= _generate(
    *(pipeline, missing, prompts, seeds, settings, mesh, prefix, improve), images.get("base")
  )
  watchdog.rest()  # scorers take an unknown time
  distributed.first(
    lambda: _judge(images, prompts, seeds, settings, scorer_names, directory, selected_by)
  )
  return images


def read_images(
  directory: Path, model: str, num_prompts: int, settings: ConfigDict
) -> np.ndarray | None:
  """Reads a model's images of an earlier evaluation; None if one is missing or damaged.

  Args:
    directory: directory of the evaluation, which has the same prompts and settings.
    model: 'base' or 'tuned'.
    num_prompts: number of its prompts.
    settings: the configuration's `evaluate` section.
  """
  seeds = sampling.seeds_of(num_prompts, settings.images_per_prompt, seed=settings.seed)
  files = [_image_file(directory / "images" / model, seed) for seed in seeds]
  try:
    return np.stack([decode(file) for file in files])
  except (BadRow, ValueError):  # an image is missing, damaged or of another size
    return None


def _generate(
  pipeline: Pipeline,
  models: Mapping[str, Any],
  prompts: Sequence[str],
  seeds: np.ndarray,
  settings: ConfigDict,
  mesh: Mesh,
  prefix: str,
  improve: ConfigDict | None,
  base_images: np.ndarray | None,
) -> dict[str, np.ndarray]:
  """Generates the images of each model.

  `base_images` are an improver's input images; None means that the base is in `models`.
  """
  make = functools.partial(
    sampling.make_generator, pipeline, mesh, batch_size=min(settings.batch_size, len(seeds))
  )
  generators = dict.fromkeys(
    models, make(num_steps=settings.num_steps, guidance=settings.guidance)
  )
  if improve:
    generators["tuned"] = make(
      num_steps=improve.num_steps,
      guidance=improve.text_guidance,
      image_guidance=improve.image_guidance,
    )
  repeats = settings.images_per_prompt
  text.warn_of_cut(pipeline.tokenizers, [prefix + p for p in prompts], "prompts to evaluate on")
  conds = dict.fromkeys(models, encode_prompts(pipeline, mesh, prompts))
  texts = np.repeat(prompts, repeats).tolist()
  if prefix:
    conds["tuned"] = encode_prompts(pipeline, mesh, [prefix + p for p in prompts])
  images: dict[str, np.ndarray] = {}
  for model, params in models.items():
    cond = jax.tree.map(lambda x: np.repeat(x, repeats, axis=0), conds[model])
    if improve and model == "tuned":
      base = images["base"] if base_images is None else base_images
      cond["image"] = encode_images(pipeline, mesh, list(base))
    # An improver's noise must differ from the noise of its input image.
    noise = seeds ^ np.uint32(2**31) if improve and model == "tuned" else seeds
    with progress.progress_bar(
      total=len(seeds), desc=f"images of the {model} model", unit="image"
    ) as bar:

      def on_batch(done, bar=bar):
        bar.update(done - bar.n)
        watchdog.beat_or_stop()

      images[model] = generators[model](params, cond, noise, on_batch, names=texts)
  return images


def _judge(
  images: Mapping[str, np.ndarray],
  prompts: Sequence[str],
  seeds: np.ndarray,
  settings: ConfigDict,
  scorer_names: Sequence[str],
  directory: Path,
  selected_by: Collection[str],
) -> None:
  """Scores images and writes all files of an evaluation."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / RESULTS).unlink(missing_ok=True)  # its presence marks the evaluation as complete
  models, repeats = tuple(images), settings.images_per_prompt
  texts = [p for p in prompts for _ in range(repeats)]
  functions = scorers.load_scorers(scorer_names)
  for model in models:
    _save_images(directory / "images" / model, images[model], seeds)
  scores = {
    (name, version, model): scorers.score(name, function, images[model], texts)
    for name, (version, function) in functions.items()
    for model in models
  }
  categories = scorers.categorize(scorer_names, texts)
  about = pd.DataFrame(
    {
      "prompt_id": np.repeat(np.arange(len(prompts)), repeats),
      "seed": seeds.astype(np.int64),
      "prompt": texts,
      "category": categories,
    }
  )
  workdir_lib.write_json(directory / _DIVERSITY, _compare_diversity(images, about))
  results: dict[str, Any] = {}
  if scores:
    rows = pd.concat(
      about.assign(model=model, scorer=name, version=version, score=values)
      for (name, version, model), values in scores.items()
    )
    results = statistics.compare(rows, selected_by=selected_by)
    score_rows.write_rows(directory / _SCORES, rows)
  order = np.random.default_rng(settings.seed).permutation(len(texts))
  examples = [
    {
      "prompt": texts[i],
      "category": categories[i],
      "seed": int(seeds[i]),
      "scores": {
        f"{name}-{version}": {m: float(scores[name, version, m][i]) for m in models}
        for name, (version, _) in functions.items()
      },
    }
    for i in order[: settings.num_examples]
  ]
  workdir_lib.write_json(directory / _EXAMPLES, examples)
  _save_grid(directory / "grid.png", images, texts, order[:_GRID_PAIRS])
  statistics.write_results(directory / RESULTS, results)


def _compare_diversity(images: Mapping[str, np.ndarray], about: pd.DataFrame) -> dict[str, Any]:
  """Compares the diversity of the models' images; `about` has a row for each image of one."""
  models = ("base", "tuned")
  return diversity.compare_diversity(
    np.concatenate([diversity.pixel_features(images[model]) for model in models]),
    pd.concat([about.assign(model=model) for model in models], ignore_index=True),
    name=_FEATURES,
    baseline="base",
    models=models,
  )


def read_diversity(directory: Path) -> dict[str, Any] | None:
  """Reads the diversity of an evaluation, see `diversity.compare_diversity`.

  Returns:
    The results; None if an earlier version, which did not measure it, made the evaluation.

  Raises:
    DamagedError: the file is damaged.
  """
  file = directory / _DIVERSITY
  return workdir_lib.read_json(file, diversity.is_diversity) if file.exists() else None


def read_results(directory: Path) -> dict[str, Any]:
  """Reads the results of an evaluation, see `statistics.compare`.

  Raises:
    DamagedError: the file is missing or damaged.
  """
  return workdir_lib.read_json(directory / RESULTS, statistics.are_results)


def _read_table(file: Path) -> list[dict[str, Any]]:
  """Reads the scores of an evaluation and computes their means by category.

  Raises:
    DamagedError: the file is missing or damaged.
  """
  if not file.is_file():
    raise DamagedError(f"{file} is missing")
  try:
    return statistics.by_category(pd.read_parquet(file))
  except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
    raise DamagedError(f"{file} is damaged: {first_line(error)}") from error


def _are_examples(value: Any) -> bool:
  return isinstance(value, list) and all(
    isinstance(one, dict)
    and type(one.get("seed")) is int
    and isinstance(one.get("prompt"), str)
    and isinstance(one.get("category"), str)
    and isinstance(one.get("scores"), dict)
    and all(
      isinstance(of, dict)
      and all(isinstance(of.get(model), int | float) for model in ("base", "tuned"))
      for of in one["scores"].values()
    )
    for one in value
  )


def _read_png(directory: Path, seed: int) -> bytes:
  """Reads the file of an image of an evaluation.

  Raises:
    DamagedError: the image is missing or damaged.
  """
  file = _image_file(directory, seed)
  try:
    decode(file)
  except BadRow as error:
    raise DamagedError(f"{file} is missing or damaged: {error}") from error
  return file.read_bytes()


def write_report(
  workdir: Path,
  directory: Path,
  config: ConfigDict,
  facts: Mapping[str, Any],
  *,
  held_out: bool,
  trained: Collection[str] = (),
  role: str = "is trained on",
  curves: Mapping[str, panels.Curve] | None = None,
  **more: Any,
) -> Path:
  """Prints the tables of an evaluation and writes `report.html`; returns its path.

  Args:
    workdir: gets the report.
    directory: directory of the evaluation.
    config: the run's configuration.
    facts: labels and values, see `report.write_report`.
    held_out: whether the model was trained on none of the prompts.
    trained: as for `reward_hacking.find_in_run`.
    role: as for `reward_hacking.find_in_run`.
    curves: training curves; by default the workdir's metrics.
    more: further sections, see `report.write_report`.
  """
  results = read_results(directory)
  table = _read_table(directory / _SCORES) if results else []
  examples = workdir_lib.read_json(directory / _EXAMPLES, _are_examples)
  for example in examples:
    for model in ("base", "tuned"):
      example[f"{model}_png"] = _read_png(directory / "images" / model, example["seed"])
  spread = read_diversity(directory)
  warnings = reward_hacking.find_in_run(
    results, [spread] if spread else [], trained=trained, role=role
  )
  path = workdir / "report.html"
  report.write_report(
    path,
    title=f"{config.name} ({config.preset})",
    config=config.to_dict(),
    results=results,
    categories=table,
    curves=metrics.read_curves(workdir) if curves is None else curves,
    examples=examples,
    facts=facts,
    held_out=held_out,
    diversity=spread,
    warnings=warnings,
    **more,
  )
  if results:
    print(score_text.to_text(results, table))
    print(report.verdict(results, held_out=held_out))
  if spread:
    print(f"\n{comparison_text.diversity_text(spread)}")
  for warning in warnings:
    print(f"warning: {warning}")
  print(f"report: {path}\nimages and scores: {directory}")
  return path


def _png(image: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "PNG")
  return buffer.getvalue()


def _save_images(directory: Path, images: np.ndarray, seeds: np.ndarray) -> None:
  # An earlier evaluation with other settings may have left images here.
  shutil.rmtree(directory, ignore_errors=True)
  for image, seed in zip(images, seeds, strict=True):
    workdir_lib.write_bytes(_image_file(directory, seed), _png(image))


def _image_file(directory: Path, seed: int) -> Path:
  return directory / f"{seed:08d}.png"


def _save_grid(
  path: Path, images: Mapping[str, np.ndarray], texts: Sequence[str], order: np.ndarray
) -> None:
  size = images["base"].shape[1]
  grid = image_grid.image_grid(
    [[images["base"][i], images["tuned"][i]] for i in order],
    captions=[report.shorten(texts[i], report.CAPTION) for i in order],
    headers=["base", "tuned"],
    columns=4,
    scale=max(128 // size, 1),
  )
  buffer = io.BytesIO()
  grid.save(buffer, "PNG")
  workdir_lib.write_bytes(path, buffer.getvalue())
