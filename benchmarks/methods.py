"""Comparison of all methods with the same data, model, sampler and evaluation.

  python benchmarks/methods.py --out=docs/methods

The script first chooses each method's learning rate and strength from a grid of six runs, with
one seed, on validation prompts. The chosen settings then train with every seed and are compared
on test prompts, which do not include validation prompts. All see equal numbers of training
images: rows x images per row x updates. Finished runs leave records in `docs/methods/`, so an
interrupted campaign resumes. The script writes the tables of `docs/methods.md`, and
`results.json` and `grid.png` into the folder; `--report` writes them from the runs that are
finished.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import campaign
import numpy as np
import pandas as pd
from PIL import Image

from jaxpref.evaluation import image_grid, statistics
from jaxpref.runtime import workdir as workdir_lib

RATES = (1e-4, 3e-4, 1e-3)
IMAGES = 64  # training images per update: rows times images per row
SHOWN = 8  # test prompts in the grid of images


@dataclasses.dataclass(frozen=True)
class Method:
  """A configuration file, its fixed fields, and the grid of settings.

  `images` is the number of training images per row. `strength` is the field that is tuned with
  the learning rate, and `values` are two values for it; without them, six learning rates are
  tried. `iterations` share the updates.
  """

  config: str
  images: int
  strength: str = ""
  values: tuple[float, ...] = ()
  fixed: tuple[str, ...] = ()
  iterations: int = 1


METHODS = {
  "sft": Method("sft", 1),
  "csft": Method("csft", 1),
  "dpo": Method("dpo", 2, "loss.beta", (500.0, 5000.0)),
  "dpo-hinge": Method("dpo", 2, "loss.beta", (500.0, 5000.0), ("loss.variant=hinge",)),
  "ipo": Method("dpo", 2, "loss.beta", (50.0, 500.0), ("loss.variant=ipo",)),
  "simpo": Method("simpo", 2, "loss.beta", (500.0, 5000.0)),
  "mapo": Method("mapo", 2, "loss.beta", (0.1, 1.0)),
  "dspo": Method("dspo", 2, "loss.beta", (0.1, 1.0)),
  "sdpo": Method("sdpo", 2, "loss.beta", (500.0, 5000.0)),
  "listwise": Method("listwise", 4, "loss.beta", (500.0, 5000.0)),
  "kto": Method("kto", 1, "loss.beta", (500.0, 5000.0)),
  "spin": Method("spin", 2, "loss.beta", (200.0, 2000.0), (), 3),
  "dro": Method("dro", 2, "loss.margin", (0.01, 0.05)),
}
_TIMES = (
  "Medians over turns that the methods take within one process, each with an update of its "
  "own on random weights. That of spin leaves out its pairs, which are generated before an "
  "iteration's updates."
)
SIX_RATES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)


def main(argv: list[str]) -> None:
  """Tunes, makes missing runs, then compares."""
  options = _parser().parse_args(argv)
  runs = campaign.open_campaign(options, _arguments(options.methods[0], options))
  campaign.record_base(runs, campaign.model_of(_arguments(options.methods[0], options)))
  finished = {}
  for name in options.methods:
    setting = choose(name, runs, options)
    if not setting:
      continue
    records = [
      campaign.record_run(
        runs,
        f"{name}-{seed}",
        _arguments(name, options, f"seed={seed}", *setting),
        functools.partial(_diversity_and_pictures, runs, f"{name}-{seed}"),
      )
      for seed in options.seeds
    ]
    if all(records):
      finished[name] = records
  if not finished:
    sys.exit("no method is finished yet")
  report(finished, runs, options)


def _parser() -> argparse.ArgumentParser:
  parser = campaign.make_parser(__doc__, "methods")
  add = parser.add_argument
  add("--updates", type=int, default=300, help="updates per run, over all its iterations")
  add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
  return parser


def _arguments(name: str, options: argparse.Namespace, *fields: str) -> list[str]:
  method = METHODS[name]
  rows = f"train.batch_size={IMAGES // method.images}"
  if options.updates % method.iterations:
    sys.exit(
      f"--updates must be a multiple of {method.iterations}, the number of iterations of {name}"
    )
  updates = (f"train.num_updates={options.updates // method.iterations}",)
  if method.iterations > 1:
    updates += (f"iterate.num_iterations={method.iterations}",)
  settings = (rows, *updates, *method.fixed, *options.set, *fields)
  return [
    f"--config=configs/{method.config}.py:{options.preset}",
    *(f"--config.{field}" for field in settings),
  ]


def grid_of(name: str) -> list[tuple[str, ...]]:
  """Returns six settings to choose from."""
  method = METHODS[name]
  if not method.values:
    return [(f"optim.lr={rate}",) for rate in SIX_RATES]
  return [
    (f"optim.lr={rate}", f"{method.strength}={value}")
    for value in method.values
    for rate in RATES
  ]


def choose(
  name: str, runs: campaign.Campaign, options: argparse.Namespace
) -> tuple[str, ...] | None:
  """Returns the best of a method's grid; None if runs are missing and none may be made."""
  return campaign.choose(runs, name, _arguments(name, options), grid_of(name))


def _diversity_and_pictures(
  runs: campaign.Campaign, name: str, workdir: Path
) -> dict[str, float]:
  """Saves strips of the tuned model's and the base's images; returns the diversity."""
  evaluation = campaign.newest_evaluation(workdir)
  for model, file in (("base", "base.png"), ("tuned", f"{name}.png")):
    paths = sorted((evaluation / "images" / model).glob("*.png"))
    shown = [np.asarray(Image.open(paths[i])) for i in shown_of(len(paths))]
    runs.records.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(shown, axis=1)).save(runs.records / file)
  return {"vendi": campaign.diversity_of(str(workdir))}


def shown_of(count: int) -> np.ndarray:
  """Returns the indices of the images, in the order of their seeds, that the grid shows."""
  return np.linspace(0, count - 1, SHOWN).astype(int)


def report(
  finished: dict[str, list[dict]], runs: campaign.Campaign, options: argparse.Namespace
) -> None:
  """Writes the document's tables, results.json and grid.png from records."""
  numbers = {name: _measure(name, records, runs, options) for name, records in finished.items()}
  first = campaign.scores_of(runs, f"{next(iter(finished))}-{options.seeds[0]}")
  base = first[first.model == "base"]
  numbers["base"] = {
    **{s: [float(v)] for s, v in base.groupby("scorer").score.mean().items()},
    "categories": _by_category(base),
    "vendi": [campaign.base_diversity(runs)],
  }
  workdir_lib.write_json(options.out / "results.json", numbers)
  text = _text(numbers, runs, options)
  campaign.write_into(campaign.document_of(options.out), text)
  prompts = list(base.drop_duplicates("seed").sort_values("seed").prompt)
  _save_grid(list(finished), prompts, runs, options)
  print(text)


def _measure(
  name: str, records: list[dict], runs: campaign.Campaign, options: argparse.Namespace
) -> dict:
  scores = [campaign.scores_of(runs, f"{name}-{seed}") for seed in options.seeds]
  tuned_rows = [s[s.model == "tuned"] for s in scores]
  # Pairs of different seeds are different pairs.
  together = pd.concat(s.assign(seed=s.seed + i * 10**6) for i, s in enumerate(scores))
  wins = statistics.compare(together)
  key = next(k for k in wins if k.startswith("shapes.quality"))
  setting = choose(name, runs, options)
  return {
    "setting": list(setting or ()),
    "tuned over": campaign.grid_scores(runs, name),
    **{
      s: [record["means"][f"tuned/{s}"] for record in records]
      for s in sorted(set(tuned_rows[0].scorer))
    },
    "categories": _by_category(pd.concat(tuned_rows)),
    "quality win rate": [wins[key]["win_rate"], *wins[key]["interval"]],
    "vendi": [record["vendi"] for record in records],
    "minutes": [record["minutes"] for record in records],
  }


def _by_category(rows: pd.DataFrame) -> dict[str, float]:
  correct = rows[rows.scorer == "shapes.correct"]
  return {str(k): float(v) for k, v in correct.groupby("category").score.mean().items()}


def _text(numbers: dict, runs: campaign.Campaign, options: argparse.Namespace) -> str:
  base = numbers["base"]
  names = sorted(
    (n for n in numbers if n != "base"), key=lambda n: -np.mean(numbers[n]["shapes.correct"])
  )
  spread = campaign.spread
  lines = [
    campaign.provenance(
      f"python benchmarks/methods.py --updates={options.updates}",
      *(runs, options.seeds, options.set),
    ),
    "",
    f"Each run tunes the bundled pipeline with {IMAGES} training images at each update - rows "
    f"times the images of a row that the loss compares - and {options.updates} updates, spin's "
    "in three iterations. Before that, six settings of each method were tried, with the same "
    "number of updates and seed 0, on 75 validation prompts, and the one with the largest sum "
    "of correctness and quality was taken; the test prompts below had no part in it. Mean +- "
    "standard deviation over seeds. The win rate is that of the tuned model's images over "
    "the base's by quality, all seeds together, with a 95 % interval "
    f"over prompts. {campaign.DIVERSITY} An update's time, with the samples that it generates, "
    "is measured separately, see below.",
    "",
    "| method | correct | quality | win rate | Vendi | time / SFT's | lr, strength |",
    "|---|---|---|---|---|---|---|",
    f"| base | {spread(base['shapes.correct'])} | {spread(base['shapes.quality'])} | | "
    f"{base['vendi'][0]:.2f} | | |",
  ]
  file = options.out / "times.json"
  times = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
  ratios = times.get("time / SFT's", {})
  for name in names:
    n = numbers[name]
    rate, low, high = n["quality win rate"]
    lines.append(
      f"| {name} | {spread(n['shapes.correct'])} | {spread(n['shapes.quality'])} "
      f"| {rate:.3f} [{low:.3f}, {high:.3f}] | {spread(n['vendi'], '{:.2f}')} "
      f"| {ratios.get(name, np.nan):.2f} | {', '.join(n['setting'])} |"
    )
  categories = list(base["categories"])
  lines += ["", "Correct by category:", "", "| method | " + " | ".join(categories) + " |"]
  lines.append("|---|" + "---|" * len(categories))
  for name in ("base", *names):
    cells = (f"{numbers[name]['categories'][c]:.2f}" for c in categories)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  if "made" in times:
    lines += ["", f"Times: {times['made']}, {times['devices']}. {_TIMES}"]
  lines += [
    "",
    "Images of the first seed, same prompts and noise:",
    "",
    f"![]({options.out.name}/grid.png)",
    "",
  ]
  return "\n".join(lines)


def _save_grid(
  names: list[str], prompts: list[str], runs: campaign.Campaign, options: argparse.Namespace
) -> None:
  """Saves a grid with one row per prompt and one column per model."""
  strips = ["base.png", *(f"{name}-{options.seeds[0]}.png" for name in names)]
  shown = [np.split(np.asarray(Image.open(runs.records / s)), SHOWN, axis=1) for s in strips]
  image_grid.image_grid(
    list(zip(*shown, strict=True)),
    captions=[prompts[i] for i in shown_of(len(prompts))],
    headers=["base", *names],
    columns=1,
    scale=max(96 // shown[0][0].shape[0], 1),
  ).save(options.out / "grid.png")


if __name__ == "__main__":
  main(sys.argv[1:])
