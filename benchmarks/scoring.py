"""Images of a campaign's models and their scores, as `python -m jaxpref.evaluate` makes them.

All models of a campaign get the same prompts, noise and sampler. The images lie in a directory
of the form that the program writes, so that it can also be called on them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from jaxpref import sharding
from jaxpref.data import images as images_lib
from jaxpref.evaluate import candidates, score_table
from jaxpref.evaluate import flags as flags_lib
from jaxpref.evaluation import diversity, prompt_sets
from jaxpref.scorers import load_scorers

HELD_OUT = "patches.likeness"  # see benchmarks/patches.py
JUDGES = ("shapes.correct", "shapes.quality", HELD_OUT)
FEATURES = "pixels"  # by which diversity is measured
VENDI = f"vendi.{FEATURES}"
SCALES = (3.5, 3.0)  # an improver's, for the prompt and for the image


def settings_of(evaluate: Any, scorers: Sequence[str] = JUDGES) -> dict[str, Any]:
  """Returns what a model's scores depend on besides its weights.

  Args:
    evaluate: the section of the runs' configuration, whose prompts, noise and sampler are used.
    scorers: names of those that judge.
  """
  return {
    "prompts": evaluate.num_prompts,
    "images per prompt": evaluate.images_per_prompt,
    "seed": evaluate.seed,
    "steps": evaluate.num_steps,
    "guidance": evaluate.guidance,
    "scorers": {name: version for name, (version, _) in load_scorers(scorers).items()},
  }


def flags_of(directory: Path, settings: Mapping[str, Any]) -> argparse.Namespace:
  """Returns the flags of `jaxpref.evaluate` for images of these settings and their scores.

  Args:
    directory: `--out`.
    settings: from `settings_of`.
  """
  text, image = SCALES
  given = {
    "models": "base=shapes",  # required; which models there are, the caller says
    "prompts": f"shapes:{settings['prompts']}",
    "seed": settings["seed"],
    "images-per-prompt": settings["images per prompt"],
    "steps": settings["steps"],
    "guidance": settings["guidance"],
    "scorers": ",".join(settings["scorers"]),
    "features": FEATURES,
    "improve-guidance": text,
    "image-guidance": image,
    "batch-size": 50,
    "out": directory,
  }
  return flags_lib.make_parser().parse_args([f"--{key}={of}" for key, of in given.items()])


def generate(
  name: str,
  model: str,
  flags: argparse.Namespace,
  *,
  prompts: Sequence[prompt_sets.Prompt] = (),
  improves: str = "",
) -> pd.DataFrame:
  """Generates the images of a model that are missing.

  Args:
    name: of the model.
    model: a run's workdir or a pipeline.
    flags: from `flags_of`.
    prompts: by default held-out prompts of the shapes world, by the flags.
    improves: the model whose images it improves, if it is an improver.

  Returns:
    The images, see `score_table.list_images`. Those with non-finite pixels have no file.
  """
  prompts = prompts or prompt_sets.load_prompts(flags.prompts, seed=flags.seed)
  images = score_table.list_images([name], prompts, flags)
  candidate = candidates.Candidate(name, model, improves)
  candidates.generate(candidate, images, flags, sharding.make_mesh(), samplers={})
  jax.clear_caches()  # the next run has other programs
  return images


def score(images: pd.DataFrame, flags: argparse.Namespace) -> pd.DataFrame:
  """Scores a model's images; returns rows with the columns `score_rows.COLUMNS`.

  Args:
    images: from `generate`.
    flags: from `flags_of`.
  """
  directory = flags.out / score_table.SCORES / str(images["model"].iloc[0])
  digested = score_table.add_digests(images)
  tables = []
  for scorer in flags.scorers.split(","):
    key = score_table.score_images(scorer, digested, directory, share="", chunk=len(images))
    tables.append(score_table.to_rows(digested, key, directory))
  return pd.concat(tables, ignore_index=True)


def spread(images: pd.DataFrame) -> pd.DataFrame:
  """Measures the diversity of each prompt's images, as rows of `diversity.prompt_rows`."""
  features = diversity.pixel_features([images_lib.decode(file) for file in images["file"]])
  return diversity.prompt_rows(features, images, name=FEATURES)
