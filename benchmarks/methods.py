"""Comparison of all methods with the same data, model, sampler and evaluation.

  python benchmarks/methods.py --out=docs/methods

The script first chooses each method's learning rate and strength from a grid of six runs, with
one seed, on validation prompts. The chosen settings then train with every seed. All models are
compared on test prompts, which do not include validation prompts, by `jaxpref.evaluate`'s
functions, see scoring.py and comparison.py. All see equal numbers of training images: rows x
images per row x updates. Finished runs leave records in `docs/methods/`, so an interrupted
campaign resumes. The script writes the tables of `docs/methods.md`, and `results.json` and
`grid.png` into the folder; `--report` writes them from the runs that are finished.
"""

import argparse
import dataclasses
import functools
import json
import sys
from typing import Any

import campaign
import comparison
import numpy as np
import pandas as pd
import scoring
from PIL import Image

from jaxpref.evaluation import image_grid
from jaxpref.runtime import workdir as workdir_lib

RATES = (1e-4, 3e-4, 1e-3)
IMAGES = 32  # training images per update: rows times images per row
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
  runs = campaign.open_campaign(options, arguments_of(options.methods[0], options))
  keep = functools.partial(_keep_pictures, runs)
  base = campaign.record_base(runs, lambda images: keep(campaign.BASE, images))
  settings, records = {}, {}
  for name in options.methods:
    settings[name] = choose(name, runs, options)
    if not settings[name]:
      continue
    for seed in options.seeds:
      records[name, seed] = campaign.record_run(
        runs,
        f"{name}-{seed}",
        arguments_of(name, options, f"seed={seed}", *settings[name]),
        lambda workdir, images, of=f"{name}-{seed}": keep(of, images),
      )
  lacking = {n: [s for s in options.seeds if not records.get((n, s))] for n in options.methods}
  finished = [name for name, seeds in lacking.items() if not seeds]
  if not finished or not base:
    sys.exit("no method is finished yet")
  about = {
    name: {
      "setting": list(settings[name] or ()),
      "tuned over": campaign.grid_scores(runs, name),
      "minutes": [(records[name, seed] or {})["minutes"] for seed in options.seeds],
    }
    for name in finished
  }
  report(about, {n: seeds for n, seeds in lacking.items() if seeds}, runs, options)


def _parser() -> argparse.ArgumentParser:
  parser = campaign.make_parser(__doc__, "methods")
  add = parser.add_argument
  add("--updates", type=int, default=240, help="updates per run, over all its iterations")
  add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
  return parser


def arguments_of(name: str, options: argparse.Namespace, *fields: str) -> list[str]:
  """Returns the arguments of a method's runs: `options` has updates, preset and set."""
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
  return campaign.choose(runs, name, arguments_of(name, options), grid_of(name))


def _keep_pictures(runs: campaign.Campaign, name: str, images: pd.DataFrame) -> dict:
  """Saves a strip of a model's images beside its record; has no further entries for it."""
  files = list(images["file"])
  shown = [np.asarray(Image.open(files[i])) for i in shown_of(len(files))]
  runs.records.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.concatenate(shown, axis=1)).save(runs.records / f"{name}.png")
  return {}


def shown_of(count: int) -> np.ndarray:
  """Returns the indices of the images, in the order of their seeds, that the grid shows."""
  return np.linspace(0, count - 1, SHOWN).astype(int)


def report(
  about: dict[str, dict[str, Any]],
  lacking: dict[str, list[int]],
  runs: campaign.Campaign,
  options: argparse.Namespace,
) -> None:
  """Writes the document's tables, results.json and grid.png from records.

  Args:
    about: of each finished method, its setting, what it was tuned over, minutes.
    lacking: seeds of which other methods have no record.
    runs: the campaign.
    options: of the command line.
  """
  names = [campaign.BASE, *(f"{name}-{seed}" for name in about for seed in options.seeds)]
  rows = pd.concat(campaign.scores_of(runs, name) for name in names)
  methods = comparison.together(rows)
  results = {
    "base": campaign.means_of(methods[methods.model == campaign.BASE]),
    "methods": about,
    "missing": lacking,
    "over runs": comparison.over_runs(rows, campaign.BASE),
    "against base": comparison.against(methods, campaign.BASE),
    "each other": comparison.each_other(methods, campaign.BASE),
    "categories": comparison.by_category(methods),
    "judged": runs.judged,
  }
  workdir_lib.write_json(options.out / "results.json", results)
  text = _text(results, runs, options)
  campaign.write_into(campaign.document_of(options.out), text)
  of_base = rows[(rows.model == campaign.BASE) & (rows.scorer == scoring.HELD_OUT)]
  _save_grid(list(about), list(of_base.sort_values("seed").prompt), runs, options)
  print(text)


def _text(results: dict, runs: campaign.Campaign, options: argparse.Namespace) -> str:
  over = results["over runs"]
  names = sorted(over, key=lambda name: -over[name][scoring.JUDGES[0]]["mean"])
  command = f"python benchmarks/methods.py --updates={options.updates}"
  lines = [
    campaign.provenance(command, runs, options.seeds, options.set),
    "",
    f"Each run tunes the bundled pipeline with {IMAGES} training images at each update - rows "
    f"times the images of a row that the loss compares - and {options.updates} updates, spin's "
    "in three iterations. Before that, six settings of each method were tried, with the same "
    f"number of updates and seed 0, on {campaign.VALIDATION_PROMPTS} validation prompts, and "
    "the one with the largest sum of correctness and quality was taken; the test prompts below "
    "had no part in it. `likeness` had no part in any choice: it is minus the distance of an "
    "image's patches from those of clean renders, in 1/255 (`benchmarks/patches.py`). An "
    "update's time, with the samples that it generates, is measured separately, see below.",
    *_missing(results["missing"]),
    "",
    "Mean +- standard deviation over training runs:",
    "",
    *_means_table(names, results, _times(options)),
    "",
    "Against the base: mean differences, with p-values of paired t-tests that are adjusted for "
    "all tests of the table by Holm's method. The unit is the prompt; its value is the mean "
    "over its images and the training runs. So these tests hold for the methods' runs above, "
    "and the spread of other runs is that of the table above. The rate counts the prompts that "
    "win by quality, with a 95 % interval. The last column sums up the three scorers; a higher "
    "Vendi score alone is not better, since noise raises it too.",
    "",
    *comparison.table({name: results["against base"][name] for name in names}),
    "",
    *_parted({name: results["against base"][name] for name in names}),
    "",
    "Each against each other, by the three scorers, with Holm's p-values over these: + the "
    "row's method is better, - worse, m scorers disagree, . undecided.",
    "",
    *comparison.matrix(results["each other"], [campaign.BASE, *names]),
    "",
    "Correct by category:",
    "",
    *_category_table([campaign.BASE, *names], results["categories"]),
  ]
  if made := _times(options).get("made"):
    lines += ["", f"Times: {made}, {_times(options)['devices']}. {_TIMES}"]
  lines += [
    "",
    f"Images of seed {options.seeds[0]}, same prompts and noise:",
    "",
    f"![]({options.out.name}/grid.png)",
    "",
  ]
  return "\n".join(lines)


def _missing(lacking: dict[str, list[int]]) -> list[str]:
  if not lacking:
    return []
  seeds = (f"{name} (seeds {', '.join(map(str, of))})" for name, of in lacking.items())
  return ["", f"Not finished, and not in the tables: {', '.join(seeds)}."]


def _parted(against: dict[str, comparison.Entries]) -> list[str]:
  said = comparison.parted(against, campaign.SCORERS)
  if not said:
    return ["No method wins by a scorer that chose its setting and loses by another measure."]
  return [f"Where the scorers that chose the settings part from another: {'; '.join(said)}."]


def _means_table(names: list[str], results: dict, times: dict[str, Any]) -> list[str]:
  ratios, base = times.get("time / SFT's", {}), results["base"]
  lines = [
    f"| method | {' | '.join(comparison.TITLES.values())} | time / SFT's | lr, strength |",
    "|---" * 7 + "|",
    f"| base | {' | '.join(f'{base[s]:.3f}' for s in comparison.SHOWN)} | | |",
  ]
  for name in names:
    means = (comparison.spread(results["over runs"][name][s]) for s in comparison.SHOWN)
    time = f"{ratios[name]:.2f}" if name in ratios else ""
    setting = ", ".join(results["methods"][name]["setting"])
    lines.append(f"| {name} | {' | '.join(means)} | {time} | {setting} |")
  return lines


def _category_table(names: list[str], categories: dict[str, dict[str, float]]) -> list[str]:
  lines = [f"| method | {' | '.join(categories)} |", "|---" * (len(categories) + 1) + "|"]
  for name in names:
    lines.append(f"| {name} | {' | '.join(f'{of[name]:.2f}' for of in categories.values())} |")
  return lines


def _times(options: argparse.Namespace) -> dict[str, Any]:
  """Reads what benchmarks/method_times.py has measured; empty without it."""
  file = options.out / "times.json"
  return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


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
