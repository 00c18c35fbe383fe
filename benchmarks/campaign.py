"""Campaigns of many runs, in which each run is made once.

A finished run leaves a record beside the tables, small enough to be committed. A campaign of
days can so be resumed later or on another machine, whose workdirs are new.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import records as records_lib
import scoring

from jaxpref import config as config_lib
from jaxpref import main
from jaxpref.errors import DivergedError
from jaxpref.evaluation import prompt_sets, score_rows
from jaxpref.models import pipeline
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.scorers import load_scorers
from jaxpref.shapes import prompts as shapes_prompts
from jaxpref.training import load_run

TEST_PROMPTS, TEST_SEED = 150, 3000  # as in the configurations' evaluation
VALIDATION_PROMPTS, VALIDATION_SEED = 75, 2000  # for the choice of settings
SCORERS = ("shapes.correct", "shapes.quality")  # their sum chooses settings
BASE = "base"  # name of the base's model and record
_END = "<!-- until here. -->"


@dataclasses.dataclass(frozen=True)
class Campaign:
  """Directories of records and workdirs, and what makes records comparable.

  Attributes:
    records: directory of the records that finished runs leave.
    packed: the same records in one file beside the tables, which is committed.
    runs: directory of workdirs; they can be deleted once the records exist.
    model: the base that every run begins with.
    base: digest of its weights.
    report_only: make no runs.
    scorers: versions of those that choose settings, by name.
    judged: what the test's scores depend on, see `scoring.settings_of`.
  """

  records: Path
  packed: Path
  runs: Path
  model: str
  base: str
  report_only: bool
  scorers: dict[str, str]
  judged: dict[str, Any]


def make_parser(description: str, name: str) -> argparse.ArgumentParser:
  """Makes a parser with the options of all campaigns; `name` is that of their folders."""
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  add = parser.add_argument
  add("--out", type=Path, default=Path("docs") / name, help="folder for tables and records")
  add("--runs", type=Path, default=Path("runs") / name, help="folder for the runs' workdirs")
  add("--seeds", type=int, nargs="+", default=[0, 1, 2])
  add("--preset", default="shapes", help="preset of all configurations")
  add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="in all configurations")
  add("--report", action="store_true", help="make no runs, report the finished ones")
  return parser


def open_campaign(
  options: argparse.Namespace,
  arguments: Sequence[str],
  judges: Sequence[str] = scoring.JUDGES,
) -> Campaign:
  """Opens a campaign whose runs have the base and the evaluation of these arguments."""
  config, _ = config_lib.parse_args(list(arguments), flags={})
  records = options.runs / "records"
  packed = options.out / "records.parquet"
  records_lib.unpack(packed, records)
  return Campaign(
    records=records,
    packed=packed,
    runs=options.runs,
    model=config.model.path,
    base=pipeline.load_pipeline(config.model.path).digest,
    report_only=options.report,
    scorers={name: version for name, (version, _) in load_scorers(SCORERS).items()},
    judged=scoring.settings_of(config.evaluate, judges),
  )


def run(workdir: Path, arguments: Sequence[str], prompts: int = 1) -> bool:
  """Makes a run, or resumes an interrupted one.

  Args:
    workdir: the run's workdir.
    arguments: of `jaxpref.main`, without the workdir.
    prompts: number of prompts of the run's own evaluation, at which alarms look. It is short,
      because `scoring` generates what counts, and the base's images once.

  Returns:
    Whether the run is finished; if not, it has diverged, for example because of a high learning
    rate. Any other failure, which the run reports on the terminal, ends the program.
  """
  print(f"\n== {workdir}: {' '.join(arguments)}", flush=True)
  own = {"num_prompts": prompts, "images_per_prompt": 1}
  short = [f"--config.evaluate.{field}={value}" for field, value in own.items()]
  status = main.main([f"--workdir={workdir}", *arguments, *short])
  jax.clear_caches()  # the next run has other programs
  if status not in (0, DivergedError.status):
    sys.exit(status)
  return not status


def read_record(campaign: Campaign, name: str, arguments: Sequence[str]) -> dict | None:
  """Reads the record of a finished run, if it was made and judged in the same way."""
  file = campaign.records / f"{name}.json"
  if not file.exists():
    return None
  record = json.loads(file.read_text(encoding="utf-8"))
  asked = _judged(campaign, arguments)
  return record if {key: record.get(key) for key in asked} == asked else None


def _asked(campaign: Campaign, arguments: Sequence[str]) -> dict[str, Any]:
  """Returns the entries in which records must agree, wherever the workdirs are."""
  return {
    "arguments": [text.replace(f"={campaign.runs}/", "=RUNS/") for text in arguments],
    "base": campaign.base,
    "scorers": campaign.scorers,
  }


def _judged(campaign: Campaign, arguments: Sequence[str]) -> dict[str, Any]:
  """Returns the entries in which records of compared models must agree."""
  return {**_asked(campaign, arguments), "judged": campaign.judged}


def record_run(
  campaign: Campaign,
  name: str,
  arguments: Sequence[str],
  measure: Callable[[Path, pd.DataFrame], dict[str, Any]] = lambda workdir, images: {},
  *,
  improves: str = "",
  prompts: int = 1,
) -> dict | None:
  """Returns the record of a run; makes the run if the record is missing.

  Args:
    campaign: the campaign.
    name: of the run in the campaign, which ends with its seed, as in "dro-0".
    arguments: of `jaxpref.main`, without the workdir.
    measure: (workdir, images) -> further entries, for a run that has just finished.
    improves: "base" if the run trains an improver, which is shown the base's images.
    prompts: see `run`.

  Returns:
    'arguments', 'base', 'scorers' (versions by name), 'judged' (see `scoring.settings_of`),
    'minutes' (of training; only the last part of a resumed run), 'means' (by scorer), 'metrics'
    (means over logged updates) and the result of `measure`. The scores by image are beside it,
    see `scores_of`. None if the record is missing and no run may be made. A run that fails ends
    the program.
  """
  if (found := read_record(campaign, name, arguments)) or campaign.report_only:
    return found
  workdir = campaign.runs / name
  began = time.perf_counter()
  if not run(workdir, arguments, prompts):
    sys.exit(1)
  minutes = (time.perf_counter() - began) / 60
  lines = (
    (load_run.trained_in(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  )
  logged = pd.DataFrame(map(json.loads, lines)).drop(columns=["step", "time"])
  images, rows = _judge(campaign, seeded(name), str(workdir), improves)
  record = {
    **_judged(campaign, arguments),
    "minutes": round(minutes, 2),
    "means": means_of(rows),
    "metrics": logged.mean().to_dict(),
    **measure(workdir, images),
  }
  _write_scores(campaign, name, rows)
  _write_record(campaign, campaign.records / f"{name}.json", record)
  return record


def record_base(
  campaign: Campaign, measure: Callable[[pd.DataFrame], Any] = lambda images: None
) -> dict | None:
  """Returns the record of the base, as of a run without arguments.

  Args:
    campaign: the campaign.
    measure: (images), called for images that have just been made.
  """
  if (found := read_record(campaign, BASE, ())) or campaign.report_only:
    return found
  images, rows = _judge(campaign, BASE, campaign.model, "")
  measure(images)
  record = {**_judged(campaign, ()), "means": means_of(rows)}
  _write_scores(campaign, BASE, rows)
  _write_record(campaign, campaign.records / f"{BASE}.json", record)
  return record


def seeded(name: str) -> str:
  """Returns the name of a run's model in comparisons: "dro/seed0" for "dro-0"."""
  return re.sub(r"-(\d+)$", r"/seed\1", name)


def _judge(
  campaign: Campaign, name: str, model: str, improves: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
  """Generates and scores a model's test images; returns the images and the rows."""
  flags = scoring.flags_of(campaign.runs / "comparison", campaign.judged)
  if improves:  # its images may be of a campaign that went on elsewhere
    scoring.generate(improves, campaign.model, flags)
  images = scoring.generate(name, model, flags, improves=improves)
  if bad := sum(not file.exists() for file in images["file"]):
    sys.exit(f"{model} gives {bad} images with non-finite pixels: it cannot be compared")
  return images, pd.concat([scoring.score(images, flags), scoring.spread(images)])


def _write_scores(campaign: Campaign, name: str, rows: pd.DataFrame) -> None:
  campaign.records.mkdir(parents=True, exist_ok=True)
  score_rows.write_rows(campaign.records / f"{name}.parquet", rows)


def _write_record(campaign: Campaign, file: Path, record: Mapping[str, Any]) -> None:
  """Writes a record, and all records of the campaign into their one file."""
  workdir_lib.write_json(file, record)
  records_lib.pack(campaign.records, campaign.packed)


def choose(
  campaign: Campaign,
  name: str,
  arguments: Sequence[str],
  settings: Sequence[tuple[str, ...]],
) -> tuple[str, ...] | None:
  """Chooses the best of several settings: the one with the largest correctness plus quality.

  Args:
    campaign: the campaign.
    name: of the method, and of the record of all settings' scores.
    arguments: of `jaxpref.main`, without workdir and seed.
    settings: fields of the configuration to try, such as ('optim.lr=1e-4',).

  Returns:
    The setting with the best images of validation prompts, which are not in the test; None
    if settings are missing and no runs may be made.
  """
  scores = {}
  for setting in settings:
    score = _validate(campaign, name, arguments, setting)
    if score is None:
      return None
    scores[setting] = score
  return max(scores, key=scores.__getitem__)


def grid_scores(campaign: Campaign, name: str) -> dict[str, float]:
  """Reads the scores of the settings that `choose` has tried."""
  return json.loads((campaign.records / "grid" / f"{name}.json").read_text(encoding="utf-8"))[
    "scores"
  ]


def _validate(
  campaign: Campaign, name: str, arguments: Sequence[str], setting: tuple[str, ...]
) -> float | None:
  """Returns a setting's score on validation prompts; -1 if it diverges."""
  record, key = campaign.records / "grid" / f"{name}.json", " ".join(setting)
  asked = _asked(campaign, arguments)
  stored = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
  if {k: stored.get(k) for k in asked} != asked:
    stored = {**asked, "scores": {}}
  if key in stored["scores"] or campaign.report_only:
    return stored["scores"].get(key)
  workdir = campaign.runs / "grid" / name / "-".join(s.split("=")[1] for s in setting)
  score = -1.0
  if run(workdir, [*arguments, *(f"--config.{field}" for field in setting)]):
    score = _validation_score(campaign, workdir, arguments)
  # Another process that tries other settings may have added scores meanwhile.
  newest = json.loads(record.read_text(encoding="utf-8")) if record.exists() else stored
  if {k: newest.get(k) for k in asked} == asked:
    stored = newest
  stored["scores"][key] = score
  _write_record(campaign, record, stored)
  return score


def _validation_score(campaign: Campaign, workdir: Path, arguments: Sequence[str]) -> float:
  """Returns correctness plus quality of a run's images of validation prompts; -1 for NaN."""
  config, _ = config_lib.parse_args(list(arguments), flags={})
  settings = scoring.settings_of(config.evaluate, SCORERS) | {"seed": VALIDATION_SEED}
  flags = scoring.flags_of(workdir / "validation", settings)
  prompts = [
    prompt_sets.Prompt(text, shapes_prompts.parse(text).category, {})
    for text in validation_prompts()
  ]
  order = np.random.default_rng(VALIDATION_SEED).permutation(len(prompts))
  images = scoring.generate("tuned", str(workdir), flags, prompts=[prompts[i] for i in order])
  if not all(file.exists() for file in images["file"]):
    return -1.0
  return sum(means_of(scoring.score(images, flags)).values())


def validation_prompts() -> list[str]:
  """Returns held-out prompts that are not in the test."""
  test = set(shapes_prompts.held_out(TEST_PROMPTS, seed=TEST_SEED))
  others = shapes_prompts.held_out(2 * TEST_PROMPTS, seed=VALIDATION_SEED)
  return [p for p in others if p not in test][:VALIDATION_PROMPTS]


def scores_of(campaign: Campaign, name: str) -> pd.DataFrame:
  """Reads the rows of a recorded run or of the base, see `score_rows`.

  The model's name is "dro/seed0" or `BASE`; diversity is a scorer with a row for each prompt.
  """
  return pd.read_parquet(campaign.records / f"{name}.parquet")


def means_of(rows: pd.DataFrame) -> dict[str, float]:
  """Computes a model's mean score by scorer."""
  return {str(scorer): float(of) for scorer, of in rows.groupby("scorer").score.mean().items()}


def write_into(file: Path, text: str, part: str = "") -> None:
  """Writes measured text between two marks of a document; the rest is written by hand.

  Args:
    file: the document. If it does not exist, it will have nothing else.
    text: in Markdown.
    part: name of the marks, if the document has several.
  """
  mark = f"<!-- measured: {part} -->" if part else "<!-- measured: -->"
  whole = file.read_text(encoding="utf-8") if file.exists() else f"{mark}\n{_END}\n"
  before, begin, rest = whole.partition(mark)
  _, end, after = rest.partition(_END)
  if not begin or not end:
    sys.exit(f"{file} has no lines {mark} and {_END}: add them where the text belongs")
  workdir_lib.write_text(file, f"{before}{begin}\n{text.strip()}\n{end}{after}")


def document_of(out: Path) -> Path:
  """Returns the document beside a campaign's folder: docs/methods.md for docs/methods."""
  return out.with_name(f"{out.name}.md")


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
  """Formats mean +- standard deviation over seeds, or a single number."""
  if len(values) == 1:
    return form.format(values[0])
  return f"{form} +- {form}".format(np.mean(values), np.std(values, ddof=1))


def provenance(
  command: str, campaign: Campaign, seeds: Sequence[int], changed: Sequence[str]
) -> str:
  """Describes machine, date, versions, seeds, scorers, and fields set in all runs."""
  changes = f" Changed: {', '.join(changed)}." if changed else ""
  judged = campaign.judged
  scorers = ", ".join(f"{name}-{version}" for name, version in judged["scorers"].items())
  return (
    f"{made_by(command)}; seeds {', '.join(map(str, seeds))}.{changes} Each model's images, "
    f"{judged['images per prompt']} of each of {judged['prompts']} held-out prompts "
    f"(DPM-Solver++, {judged['steps']} steps, guidance {judged['guidance']:g}), have the same "
    f"noise, and are scored and compared by the functions of `python -m jaxpref.evaluate`: "
    f"{scorers}; Vendi scores of each prompt's images, by their pixels."
  )


def made_by(command: str) -> str:
  """Describes command, date, machine and versions, as the beginning of a sentence."""
  versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "diffusers"))
  return (
    f"Made by `{command}` on {datetime.date.today()}: {platform.machine()}, "
    f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
  )
