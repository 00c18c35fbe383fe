"""The flags of `python -m jaxpref.evaluate`."""

import argparse
import math
from pathlib import Path

from jaxpref.base_config import DTYPES, SOLVERS
from jaxpref.runtime import cli


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the program's arguments."""
  parser = cli.Parser("Compares any number of models on the same prompts and noise.")
  add = parser.add_argument
  add(
    "--models",
    required=True,
    metavar="NAME=MODEL,...",
    help="runs' workdirs, pipelines' directories, Hub ids or 'shapes', each with a name; names "
    "like dro/seed0 and dro/seed1 are training runs of one method",
  )
  add("--baseline", default="", metavar="NAME", help="default: the first of --models")
  add(
    "--improve",
    default="",
    metavar="NAME:OTHER",
    help="the model NAME is an improver, of the images of OTHER",
  )
  add(
    "--prompts",
    required=True,
    help="a prompt set, such as geneval, partiprompts, shapes:150 or pickapic-test:FILE; a "
    "file of prompts; or a prompt",
  )
  add(
    "--num-prompts", type=cli.at_least_1, metavar="N", help="take N of them, chosen at random"
  )
  add("--scorers", default="", metavar="NAME,...", help="such as pickscore.v1,shapes.correct")
  add(
    "--selected-by",
    default="",
    metavar="NAME,...",
    help="scorers that had a part in the training; they are shown but do not decide",
  )
  add(
    "--scores",
    default="",
    metavar="FILE,...",
    help="scores of other judges: parquet, csv or jsonl with the columns model, prompt_id, "
    "seed, scorer, version, score",
  )
  add(
    "--geneval",
    default="",
    metavar="NAME=FILE,...",
    help="results.jsonl of GenEval's program for the images of the model NAME",
  )
  add(
    "--features",
    default="pixels",
    help="what diversity is measured by: pixels (32 x 32), clip.l14 or clip.h14",
  )
  add(
    "--unit",
    default="mean",
    help="a prompt's score: the mean of its images, single, or median:SCORER",
  )
  add("--out", required=True, type=Path, help="directory of images, scores and report")
  add("--images-per-prompt", type=cli.at_least_1, default=5, metavar="N")
  add("--seed", type=int, default=0, help="of the first image; it increases by 1 per image")
  add("--guidance", type=_scale, help="default: that of the first run's evaluation, or 7.5")
  add("--improve-guidance", type=_scale, default=3.5, help="an improver's, for the prompt")
  add("--image-guidance", type=_scale, default=3.0, help="an improver's, for the image")
  add("--steps", type=cli.at_least_1, default=50, help="number of solver steps")
  add("--solver", choices=SOLVERS, default="dpm_solver")
  add("--order", type=int, choices=(1, 2, 3), default=2, help="order of DPM-Solver++")
  add("--size", type=cli.size, metavar="WxH", help="default: the model's training size")
  add("--negative", default="", help="a prompt to guide away from")
  add("--batch-size", type=cli.at_least_1, default=8, help="number of images at a time")
  add("--decode", choices=("whole", "sliced", "tiled"), default="whole")
  add("--dtype", choices=DTYPES, default="float32", help="computation dtype")
  add("--shard", type=cli.share, metavar="I/N", help="do the share I of N, from 0, and stop")
  add("--resamples", type=cli.at_least_1, default=10_000, help="of the bootstrap")
  add("--examples", type=cli.at_least_1, default=24, metavar="N", help="prompts in the report")
  parser.add_run_flags()
  return parser


def _scale(text: str) -> float:
  value = float(text)
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text!r}")
  return value
