"""Steps of an experiment: commands of jaxpref's programs, each of which resumes by itself."""

import argparse
import importlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pandas as pd

from jaxpref import config as config_lib
from jaxpref import scorers as scorers_lib
from jaxpref.errors import UserError
from jaxpref.evaluate import candidates
from jaxpref.evaluate import flags as flags_lib
from jaxpref.evaluation import prompt_sets
from jaxpref.plan import estimate
from jaxpref.runtime import cli, throughput

PROGRAMS = {  # module -> where its `main` is
  "jaxpref.data": "jaxpref.data.commands",
  "jaxpref.score": "jaxpref.score.score_images",
  "jaxpref.main": "jaxpref.main",
  "jaxpref.evaluate": "jaxpref.evaluate.program",
}

# Flags of comparisons, at full scale and in a rehearsal.
FULL = ("--dtype=bfloat16", "--batch-size=16")
REHEARSED = ("--resamples=100",)  # a bootstrap of 10,000 would take longer than the images


class Step(NamedTuple):
  """A command of an experiment.

  Attributes:
    name: a word for the step.
    module: the program, as after `python -m`.
    arguments: of the program.
    product: a file that the finished step has written, or None to run it always.
  """

  name: str
  module: str
  arguments: list[str]
  product: Path | None = None

  def command(self) -> str:
    """Returns the command line."""
    return shlex.join(["python", "-m", self.module, *self.arguments])


def run(steps: Sequence[Step], *, in_process: bool) -> None:
  """Runs the steps that have not finished, in order.

  Args:
    steps: of the experiment.
    in_process: whether to call the programs in this process, which saves the start of each;
      otherwise each is a process of its own and gives its memory back.

  Raises:
    SystemExit: a step fails. The same command then continues with that step.
  """
  for number, step in enumerate(steps, 1):
    head = f"[{number}/{len(steps)}] {step.name}"
    if step.product is not None and step.product.exists():
      print(f"{head}: finished before", flush=True)
      continue
    print(f"{head}\n{step.command()}", flush=True)
    began = time.perf_counter()
    if in_process:
      status = importlib.import_module(PROGRAMS[step.module]).main(step.arguments)
    else:
      status = subprocess.run(
        [sys.executable, "-m", step.module, *step.arguments], check=False
      ).returncode
    if status:
      raise SystemExit(f"{step.name} failed with status {status}; the same command resumes it")
    print(f"{head}: {time.perf_counter() - began:.0f} s", flush=True)


def hours(steps: Sequence[Step], topology: str, mfu: float, prompts: int = 500) -> pd.DataFrame:
  """Estimates the hours and the memory of training and of generating images, from counts.

  Hours are FLOPs of the UNet over the devices' assumed speed; encoding, decoding and scoring,
  a few per cent, are left out.

  Args:
    steps: of the experiment.
    topology: devices, as for `python -m jaxpref.plan`.
    mfu: assumed share of the devices' peak.
    prompts: number of prompts of a comparison that does not choose some of them.

  Returns:
    One row for each step that trains or compares: `step, updates`, the hours of `training` and
    of `generating`, `GiB a device, fits`.
  """
  chip, devices = estimate.parse_topology(topology)
  speed = devices * mfu * (throughput.peak_of(chip.kind) or 1.0) * 3600  # FLOPs an hour
  rows: list[dict[str, Any]] = []
  forward = 0.0  # FLOPs of the UNet for one image
  for step in steps:
    if step.module == "jaxpref.evaluate":
      evaluations = _evaluations_of_comparison(step.arguments, prompts)
      generating = evaluations * forward / speed
      rows.append({"step": step.name, "training": 0.0, "generating": generating, "fits": True})
    if step.module != "jaxpref.main":
      continue
    arguments = [a for a in step.arguments if not a.startswith("--workdir")]
    config, _ = config_lib.parse_args(arguments, flags={})
    found = estimate.plan(config, topology, mfu=mfu, search=False)
    forward = found["forward"]
    iterations, evaluations = 1, 0
    if "iterate" in config:
      iterations = config.iterate.num_iterations
      evaluations = 2 * config.iterate.num_steps
      if config.iterate.winners == "improved":
        evaluations += 3 * config.improve.num_steps
      evaluations *= iterations * config.iterate.num_pairs
    rows.append(
      {
        "step": step.name,
        "updates": config.train.num_updates * iterations,
        "training": found["hours"],
        "generating": evaluations * forward / speed,
        "GiB a device": found["memory"]["total"],
        "fits": found["fits"],
      }
    )
  return pd.DataFrame(rows)


def _evaluations_of_comparison(arguments: Sequence[str], prompts: int) -> int:
  """Counts the UNet's evaluations: two for each step with guidance, an improver's three."""
  flags = flags_lib.make_parser().parse_args(arguments)
  models = candidates.parse(flags.models, flags.improve)
  images = min(prompts, flags.num_prompts or prompts) * flags.images_per_prompt
  return images * flags.steps * sum(3 if model.improves else 2 for model in models)


def main(experiment: Callable[[], None]) -> NoReturn:
  """Runs an experiment and exits with its status; what a user can mend is one line."""

  def run_experiment(argv: list[str]) -> None:
    del argv  # `reproduce` reads it
    experiment()

  cli.run(lambda argv: cli.exit_status(run_experiment, argv))


def reproduce(
  about: str,
  *,
  out: str,
  scorers: Mapping[str, str],
  make_steps: Callable[[argparse.Namespace, Mapping[str, str]], list[Step]],
  tables: Callable[[Path, Mapping[str, str]], str],
  prepare: Callable[[argparse.Namespace], None] = lambda options: None,
) -> None:
  """Runs, rehearses or plans an experiment, as the command line says.

  Args:
    about: the program's documentation.
    out: the default of --out.
    scorers: the paper's name of a scorer -> its name here.
    make_steps: lists the steps from the options and the scorers.
    tables: formats the results in a directory, in Markdown.
    prepare: writes what the steps need, before the first.
  """
  parser = argparse.ArgumentParser(
    description=about, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--data", type=Path, help="folder with Pick-a-Pic v2's parquet files")
  parser.add_argument("--test", help="parquet file of test_unique: its prompts are compared on")
  parser.add_argument("--model", default="", help="Stable Diffusion 1.5: directory or Hub id")
  parser.add_argument("--out", type=Path, default=Path(out))
  parser.add_argument("--rehearse", action="store_true", help="everything, in miniature")
  parser.add_argument("--plan", metavar="TOPOLOGY", help="hours and memory on, say, h200:8")
  parser.add_argument("--mfu", type=float, default=0.4, help="for --plan: share of the peak")
  options = parser.parse_args()
  options.out = options.out.resolve()
  if options.plan:
    options.data = options.data or Path("PICKAPIC")
    options.test = options.test or "TEST"
    options.model = options.model or "stable-diffusion-v1-5/stable-diffusion-v1-5"
    found = hours(make_steps(options, scorers), options.plan, options.mfu)
    print(found.round(1).to_string(index=False, na_rep=""))
    total = found["training"].sum() + found["generating"].sum()
    print(f"{total:,.0f} hours in all on {options.plan}, at an assumed MFU of {options.mfu}")
    return
  if options.rehearse:
    import rehearsal  # noqa: PLC0415

    options.data, options.test, options.model, scorers = rehearsal.write_inputs(
      options.out, scorers
    )
  for name in ("data", "test", "model"):
    if not getattr(options, name):
      raise UserError(f"--{name} is missing (or --rehearse, or --plan)")
  if Path(options.test).suffix == ".parquet":
    options.test = f"pickapic-test:{Path(options.test).resolve()}"
  # These are needed last, after days.
  scorers_lib.find_files(scorers.values())
  prompt_sets.load_prompts(str(options.test))
  prepare(options)
  run(make_steps(options, scorers), in_process=options.rehearse)
  text = tables(options.out, scorers)
  if options.rehearse:
    text = "A rehearsal: these numbers mean nothing.\n\n" + text
  (options.out / "table.md").write_text(text)
  print(f"\n{text}\ntable: {options.out / 'table.md'}")
