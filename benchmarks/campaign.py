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

from jaxpref import config as config_lib
from jaxpref import main, sharding
from jaxpref.data import encode
from jaxpref.errors import DivergedError
from jaxpref.evaluation import sampling, vendi
from jaxpref.models import pipeline
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.scorers import load_scorers
from jaxpref.shapes import prompts as shapes_prompts
from jaxpref.training import load_run

ALIKE, PROMPTS = 16, 10  # images per prompt for the diversity score, and number of prompts
TEST_PROMPTS, TEST_SEED = 150, 3000  # as in the configurations' evaluation
VALIDATION_PROMPTS = 75  # for the choice of settings
SCORERS = ("shapes.correct", "shapes.quality")  # as in the configurations' evaluation
FIRST_SCORERS = dict.fromkeys(SCORERS, "1")  # for records without versions
BASE = "base.json"  # the record of the base's diversity
_BEGIN, _END = "<!-- measured: -->", "<!-- until here. -->"
DIVERSITY = (
  f"Vendi scores are of {ALIKE} images of a prompt ({ALIKE} would be most diverse), by the "
  f"cosine of their latents, mean over {PROMPTS} prompts."
)


@dataclasses.dataclass(frozen=True)
class Campaign:
  """Directories of records and workdirs, and what makes records comparable.

  Attributes:
    records: directory of the records that finished runs leave.
    packed: the same records in one file beside the tables, which is committed.
    runs: directory of workdirs; they can be deleted once the records exist.
    base: digest of the weights that every run begins with.
    report_only: make no runs.
    scorers: versions by name; records with other versions do not count.
  """

  records: Path
  packed: Path
  runs: Path
  base: str
  report_only: bool
  scorers: dict[str, str]


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


def model_of(arguments: Sequence[str]) -> str:
  """Returns the base that a run with these arguments tunes."""
  config, _ = config_lib.parse_args(list(arguments), flags={})
  return config.model.path


def open_campaign(options: argparse.Namespace, arguments: Sequence[str]) -> Campaign:
  """Opens a campaign whose runs tune the same base as a run with these arguments."""
  base = pipeline.load_pipeline(model_of(arguments)).digest
  records = options.runs / "records"
  packed = options.out / "records.parquet"
  records_lib.unpack(packed, records)
  scorers = _recorded_scorers(records) if options.report else {}
  scorers = scorers or _current_scorers()
  return Campaign(records, packed, options.runs, base, options.report, scorers)


def _current_scorers() -> dict[str, str]:
  return {name: version for name, (version, _) in load_scorers(SCORERS).items()}


def _recorded_scorers(records: Path) -> dict[str, str]:
  """Returns the versions that all records were scored with, empty without records."""
  found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(records.glob("*.json"))]
  versions = [r.get("scorers", FIRST_SCORERS) for r in found if "means" in r]
  if any(v != versions[0] for v in versions):
    sys.exit(f"{records} has records of several versions of the scorers: they do not compare")
  return versions[0] if versions else {}


def run(workdir: Path, arguments: Sequence[str]) -> bool:
  """Makes a run, or resumes an interrupted one.

  Args:
    workdir: the run's workdir.
    arguments: of `jaxpref.main`, without the workdir.

  Returns:
    Whether the run is finished; if not, it has diverged, for example because of a high learning
    rate. Any other failure, which the run reports on the terminal, ends the program.
  """
  print(f"\n== {workdir}: {' '.join(arguments)}", flush=True)
  status = main.main([f"--workdir={workdir}", *arguments])
  jax.clear_caches()  # the next run has other programs
  if status not in (0, DivergedError.status):
    sys.exit(status)
  return not status


def read_record(campaign: Campaign, name: str, arguments: Sequence[str]) -> dict | None:
  """Reads the record of a finished run, if it was made with these arguments."""
  file = campaign.records / f"{name}.json"
  if not file.exists():
    return None
  record = json.loads(file.read_text(encoding="utf-8"))
  asked = _asked(campaign, arguments)
  record.setdefault("scorers", FIRST_SCORERS)
  return record if {key: record[key] for key in asked} == asked else None


def _asked(campaign: Campaign, arguments: Sequence[str]) -> dict[str, Any]:
  """Returns the entries in which records must agree."""
  return {
    "arguments": list(arguments),
    "base": campaign.base,
    "scorers": campaign.scorers,
  }


def record_run(
  campaign: Campaign,
  name: str,
  arguments: Sequence[str],
  measure: Callable[[Path], dict[str, Any]] = lambda workdir: {},
) -> dict | None:
  """Returns the record of a run; makes the run if the record is missing.

  Args:
    campaign: the campaign.
    name: of the run in the campaign.
    arguments: of `jaxpref.main`, without the workdir.
    measure: (workdir) -> further entries, for a run that has just finished.

  Returns:
    'arguments', 'base', 'scorers' (versions by name), 'minutes' (with the evaluation; only the
    last part of a resumed run), 'means' (by '<model>/<scorer>'), 'metrics' (means over logged
    updates) and the result of `measure`. The scores by image are beside it, see `scores_of`.
    None if the record is missing and no run may be made. A run that fails ends the program.
  """
  if (found := read_record(campaign, name, arguments)) or campaign.report_only:
    return found
  workdir = campaign.runs / name
  began = time.perf_counter()
  if not run(workdir, arguments):
    sys.exit(1)
  minutes = (time.perf_counter() - began) / 60
  scores = pd.read_parquet(newest_evaluation(workdir) / "scores.parquet")
  lines = (
    (load_run.trained_in(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  )
  logged = pd.DataFrame(map(json.loads, lines)).drop(columns=["step", "time"])
  record = {
    **_asked(campaign, arguments),
    "minutes": round(minutes, 2),
    "means": means_of(scores),
    "metrics": logged.mean().to_dict(),
    **measure(workdir),
  }
  campaign.records.mkdir(parents=True, exist_ok=True)
  scores.to_parquet(campaign.records / f"{name}.parquet", index=False)
  _write_record(campaign, campaign.records / f"{name}.json", record)
  return record


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
  stored.setdefault("scorers", FIRST_SCORERS)
  if {k: stored.get(k) for k in asked} != asked:
    stored = {**asked, "scores": {}}
  if key in stored["scores"] or campaign.report_only:
    return stored["scores"].get(key)
  workdir = campaign.runs / "grid" / name / "-".join(s.split("=")[1] for s in setting)
  for_validation = (
    f"evaluate.prompts={_validation_file(campaign)}",
    "evaluate.seed=2000",
    f"evaluate.num_prompts={VALIDATION_PROMPTS}",
  )
  score = -1.0
  fields = (f"--config.{f}" for f in (*setting, *for_validation))
  if run(workdir, [*arguments, *fields]):
    scores = pd.read_parquet(newest_evaluation(workdir) / "scores.parquet")
    score = float(scores[scores.model == "tuned"].groupby("scorer").score.mean().sum())
  # Another process that tries other settings may have added scores meanwhile.
  newest = json.loads(record.read_text(encoding="utf-8")) if record.exists() else stored
  if {k: newest.get(k) for k in asked} == asked:
    stored = newest
  stored["scores"][key] = score
  _write_record(campaign, record, stored)
  return score


def validation_prompts() -> list[str]:
  """Returns held-out prompts that are not in the runs' evaluations."""
  test = set(shapes_prompts.held_out(TEST_PROMPTS, seed=TEST_SEED))
  others = [p for p in shapes_prompts.held_out(2 * TEST_PROMPTS, seed=2000) if p not in test]
  return others[:VALIDATION_PROMPTS]


def _validation_file(campaign: Campaign) -> Path:
  file = campaign.runs.resolve() / "validation.txt"
  if not file.exists():
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(validation_prompts()) + "\n", encoding="utf-8")
  return file


def newest_evaluation(workdir: Path) -> Path:
  """Returns the directory of a run's last evaluation."""
  evaluations = load_run.trained_in(workdir) / "evaluation"
  return max(evaluations.iterdir(), key=lambda p: int(p.name))


def scores_of(campaign: Campaign, name: str) -> pd.DataFrame:
  """Reads the scores of a recorded run's evaluation, one row per image and scorer."""
  return pd.read_parquet(campaign.records / f"{name}.parquet")


def means_of(scores: pd.DataFrame) -> dict[str, float]:
  """Computes mean scores by '<model>/<scorer>'."""
  means = scores.groupby(["model", "scorer"]).score.mean()
  return {f"{model}/{scorer}": float(value) for (model, scorer), value in means.items()}


def record_base(campaign: Campaign, model: str) -> None:
  """Records the diversity of the base; its scores are in every run's record."""
  file = campaign.records / BASE
  stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
  if stored.get("base") != campaign.base and not campaign.report_only:
    found = {"base": campaign.base, "vendi": diversity_of(model)}
    _write_record(campaign, file, found)


def base_diversity(campaign: Campaign) -> float:
  """Reads the result of `record_base`."""
  return json.loads((campaign.records / BASE).read_text(encoding="utf-8"))["vendi"]


def diversity_of(model: str) -> float:
  """Computes the Vendi score of images of one prompt, by latents, mean over test prompts.

  Args:
    model: a run's workdir or a pipeline.
  """
  mesh = sharding.make_mesh()
  pipe = load_run.load(model, mesh=mesh)
  generator = sampling.make_generator(pipe, mesh, num_steps=20, guidance=2.0, batch_size=40)
  prefix = load_run.prompt_prefix(model)
  prompts = [
    prefix + p for p in shapes_prompts.held_out(TEST_PROMPTS, seed=TEST_SEED)[:PROMPTS]
  ]
  cond = encode.encode_prompts(pipe, mesh, prompts)
  cond = jax.tree.map(lambda x: np.repeat(x, ALIKE, axis=0), cond)
  images = generator(pipe.params["unet"], cond, np.arange(PROMPTS * ALIKE) + 9000)
  latents = encode.encode_images(pipe, mesh, list(images)).reshape(PROMPTS, ALIKE, -1)
  jax.clear_caches()
  return float(np.mean([vendi.vendi_score(of) for of in latents]))


def write_into(file: Path, text: str) -> None:
  """Writes measured text between two marks of a document; the rest is written by hand."""
  whole = file.read_text(encoding="utf-8") if file.exists() else f"{_BEGIN}\n{_END}\n"
  before, begin, rest = whole.partition(_BEGIN)
  _, end, after = rest.partition(_END)
  if not begin or not end:
    sys.exit(f"{file} has no lines {_BEGIN} and {_END}: add them where the text belongs")
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
  scorers = ", ".join(f"{name}-{version}" for name, version in campaign.scorers.items())
  return f"{made_by(command)}; seeds {', '.join(map(str, seeds))}. Scorers: {scorers}.{changes}"


def made_by(command: str) -> str:
  """Describes command, date, machine and versions, as the beginning of a sentence."""
  versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("jax", "flax", "diffusers"))
  return (
    f"Made by `{command}` on {datetime.date.today()}: {platform.machine()}, "
    f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}"
  )
