"""Reproduces the tables of the paper on improvement models and iterative DPO, from raw data.

  python experiments/reproduce_improver.py --data=PICKAPIC --test=PARQUET --model=MODEL
  python experiments/reproduce_improver.py --rehearse --out=DIR
  python experiments/reproduce_improver.py --plan=h200:1

The arguments are those of `reproduce_dro.py`; of the scorers, PickScore's weights are needed.
The steps: build the data set; train SPIN in three iterations and the improver on the pairs;
from SPIN's third iterate, with the base as reference, train iterative DPO with 2,560, 12,800
and 38,400 generated pairs an iteration; and compare the base, SPIN, the improver and iterative
DPO by PickScore on 500 prompts of the training data and on the test prompts, and by the Vendi
score of 64 images on ten test prompts.

What the paper leaves open is decided here: the improver improves the base's images; five
images of a prompt with DPM-Solver++, 50 steps at guidance 7.5; 5000 updates an iteration
however many pairs there are; and Vendi scores of pixels, which compare only with each other.

Every step is a command of jaxpref, printed before it runs; a step that was interrupted resumes.
`--rehearse` does the same with small generated files, a tiny model and random scorers, in
minutes on a CPU; its numbers mean nothing. `--plan` prints hours and memory from counts.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import steps as steps_lib  # noqa: E402
from steps import Step  # noqa: E402

from jaxpref.data.sources import pickapic  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCORERS = {"PickScore": "pickscore.v1"}
PAIRS = (2560, 12_800, 38_400)  # in an iteration
ITERATIVE = tuple(f"iterative-{pairs}" for pairs in PAIRS)
MODELS = ("base", "spin", "improver", *ITERATIVE)
# PickScore in the paper, on prompts of the training data and of the test split.
PUBLISHED = {
  "spin": (21.15, 21.41),
  "improver": (21.30, 21.38),
  "iterative-2560": (21.10, 21.27),
  "iterative-12800": (21.13, 21.36),
  "iterative-38400": (21.20, 21.46),
}
_SEEN = "training_prompts.json"


def make_steps(options: argparse.Namespace, scorers: Mapping[str, str]) -> list[Step]:
  """Lists the experiment's steps.

  Args:
    options: of the command line.
    scorers: the paper's name of a scorer -> its name here.
  """
  data, runs = options.out / "data", options.out / "runs"
  found = [
    Step(
      "build",
      "jaxpref.data",
      ["build", "--source=pickapic", f"--path={options.data}", f"--out={data}"],
    ),
    _train(options, "spin", "spin", "--config.data.experts=winners"),
    _train(options, "improver", "improver"),
  ]
  for name, pairs, few in zip(ITERATIVE, PAIRS, (8, 12, 16), strict=True):
    more = [
      f"--config.model.start={runs / 'spin'}",
      f"--config.iterate.improver={runs / 'improver'}",
      f"--config.iterate.num_pairs={few if options.rehearse else pairs}",
    ]
    if options.rehearse:  # untrained models change little
      more += ["--config.iterate.num_iterations=1", "--config.data.min_change=0"]
    found.append(_train(options, name, "iterative_dpo", *more))
  score = [f"--scorers={scorers['PickScore']}"]
  each = f"--images-per-prompt={2 if options.rehearse else 5}"
  seen = options.out / _SEEN
  found.append(_compare(options, "training-prompts", [f"--prompts={seen}", each, *score]))
  found.append(_compare(options, "test-prompts", [f"--prompts={options.test}", each, *score]))
  few = ["--num-prompts=1", each] if options.rehearse else ["--num-prompts=10"]
  many = few if options.rehearse else [*few, "--images-per-prompt=64"]
  found.append(_compare(options, "diversity", [f"--prompts={options.test}", *many]))
  return found


def _train(options: argparse.Namespace, name: str, method: str, *more: str) -> Step:
  workdir = options.out / "runs" / name
  arguments = [
    f"--config={ROOT / 'configs' / f'{method}.py'}:{'tiny' if options.rehearse else 'sd15'}",
    f"--workdir={workdir}",
    f"--config.model.path={options.model}",
    f"--config.data.path={options.out / 'data'}",
    # The comparisons of all models are steps of their own.
    "--config.evaluate.num_prompts=2",
    "--config.evaluate.images_per_prompt=1",
    *more,
  ]
  return Step(name, "jaxpref.main", arguments, workdir / "report.html")


def _compare(options: argparse.Namespace, name: str, more: list[str]) -> Step:
  runs, out = options.out / "runs", options.out / name
  models = [f"base={options.model}", *(f"{m}={runs / m}" for m in MODELS if m != "base")]
  arguments = [
    f"--models={','.join(models)}",
    "--improve=improver:base",
    "--guidance=7.5",
    f"--steps={2 if options.rehearse else 50}",
    f"--out={out}",
    *(steps_lib.REHEARSED if options.rehearse else steps_lib.FULL),
    *more,
  ]
  return Step(name, "jaxpref.evaluate", arguments, out / "results.json")


def write_training_prompts(options: argparse.Namespace) -> None:
  """Writes a seeded choice of the different captions of the training data."""
  file, count = options.out / _SEEN, 2 if options.rehearse else 500
  if not file.exists():
    rows = pickapic.open_pickapic(str(options.data), "captions")
    texts = (row["caption"].decode(errors="replace").strip() for row in rows)
    different = sorted({text for text in texts if text})
    chosen = np.random.default_rng(0).permutation(len(different))[:count]
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([different[i] for i in sorted(chosen)]))


def tables(
  seen: Mapping[str, Any], test: Mapping[str, Any], diversity: Mapping[str, Any]
) -> str:
  """Formats PickScore beside the published numbers, and diversity, in Markdown.

  Args:
    seen: results of the comparison on prompts of the training data.
    test: results of the comparison on the test prompts.
    diversity: results of the comparison with many images of a prompt.
  """
  head = ["| model | training prompts (paper) | test prompts (paper) |", "|---|---|---|"]
  row = lambda name: _scores(name, seen, test)  # noqa: E731
  best = ITERATIVE[-1]
  lines = ["PickScore by method:", "", *head, *map(row, ("base", "spin", "improver", best))]
  lines += ["", "PickScore of iterative DPO by the pairs of an iteration:", ""]
  lines += [*head, *map(row, ITERATIVE)]
  lines += ["", "Vendi score of a prompt's images, mean over prompts:", ""]
  lines += ["| model | Vendi |", "|---|---|"]
  of = diversity["diversity"]["by_prompt"]["models"]
  lines += [f"| {name} | {of[name]['vendi.pixels-1']['mean']:.2f} |" for name in MODELS]
  return "\n".join(lines) + "\n"


def _scores(name: str, *results: Mapping[str, Any]) -> str:
  cells = []
  for place, found in enumerate(results):
    (of,) = found["models"][name].values()
    paper = f"{PUBLISHED[name][place]:.2f}" if name in PUBLISHED else "-"
    cells.append(f"{of['mean']:.3f} ± {of['std_prompts']:.3f} ({paper})")
  return f"| {name} | {' | '.join(cells)} |"


def _read_tables(out: Path, scorers: Mapping[str, str]) -> str:
  del scorers
  names = ("training-prompts", "test-prompts", "diversity")
  return tables(*(json.loads((out / name / "results.json").read_text()) for name in names))


def main() -> None:
  """Runs, rehearses or plans the experiment, as the command line says."""
  steps_lib.reproduce(
    __doc__,
    out="runs/reproduce_improver",
    scorers=SCORERS,
    prepare=write_training_prompts,
    make_steps=make_steps,
    tables=_read_tables,
  )


if __name__ == "__main__":
  steps_lib.main(main)
