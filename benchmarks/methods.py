"""Every method under the same data, model, sampler and evaluation, on the embedded world.

  python benchmarks/methods.py --out=docs/methods

First each method's learning rate and strength are chosen, from a grid of six runs for each,
with one seed, on validation prompts; then the chosen ones train with every seed and are
compared on test prompts, which no validation prompt is among. All see as many training
images: rows x images of a row x updates. Runs lie in `runs/methods/`; a finished one is
kept, so that a campaign of days goes on where it stopped. Writes `methods.md`,
`results.json` and `grid.png`; with only a part of the runs done, `--report` writes what
there is so far.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import campaign
import jax
import numpy as np
import pandas as pd
from PIL import Image

from jaxpref import sharding, tuned
from jaxpref.data import encode
from jaxpref.data.shapes import prompts as shapes_prompts
from jaxpref.evaluation import compare, generate, grid, vendi

RATES = (3e-5, 1e-4, 3e-4)
IMAGES = 64  # trained on at an update, over rows and images of a row
ALIKE, PROMPTS = 16, 10  # pictures of a prompt whose diversity is scored, and prompts


@dataclasses.dataclass(frozen=True)
class Method:
  """A configuration file, what is fixed of it, and the grid.

  `images`: those of a row that are trained on; `strength`: the field tuned beside the
  learning rate, and `values` two for it - or none, and six learning rates.
  """

  config: str
  images: int
  strength: str = ""
  values: tuple[float, ...] = ()
  fixed: tuple[str, ...] = ()


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
  "spin": Method("spin", 2, "loss.beta", (200.0, 2000.0)),
  "dro": Method("dro", 2, "loss.margin", (0.01, 0.05)),
}
SIX_RATES = (3e-5, 6e-5, 1e-4, 2e-4, 3e-4, 6e-4)


def main(argv: list[str]) -> None:
  """Tunes, runs what is missing, then compares."""
  options = _parser().parse_args(argv)
  campaign.check_base(options.runs, _base(options))
  chosen = {}
  for name in options.methods:
    chosen[name] = choose(name, options)
    for seed in options.seeds if chosen[name] and not options.report else ():
      if not campaign.run(*_final(name, chosen[name], seed, options)):
        sys.exit(1)
  report({name: grid for name, grid in chosen.items() if grid}, options)


def _parser() -> argparse.ArgumentParser:
  parser = campaign.make_parser(__doc__, "methods")
  add = parser.add_argument
  add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
  add("--tune-updates", type=int, default=100, help="of a run of the grid")
  add("--report", action="store_true", help="run nothing, report what is finished")
  return parser


def _base(options: argparse.Namespace) -> str:
  return campaign.model_of(_arguments(next(iter(METHODS)), options))


def _arguments(name: str, options: argparse.Namespace, *fields: str) -> list[str]:
  method = METHODS[name]
  rows = f"train.batch_size={IMAGES // method.images}"
  settings = (rows, *method.fixed, *options.set, *fields)
  return [
    f"--config=configs/{method.config}.py:{options.preset}",
    *(f"--config.{field}" for field in settings),
  ]


def grid_of(name: str) -> list[tuple[str, ...]]:
  """Six settings to choose from."""
  method = METHODS[name]
  if not method.values:
    return [(f"optim.lr={rate}",) for rate in SIX_RATES]
  return [
    (f"optim.lr={rate}", f"{method.strength}={value}")
    for value in method.values
    for rate in RATES
  ]


def choose(name: str, options: argparse.Namespace) -> tuple[str, ...] | None:
  """The best of the grid: largest sum of correctness and quality on validation prompts.

  None where runs of the grid are missing and none may be made.
  """
  validation = _validation_prompts(options)
  record = options.runs / "tune" / f"{name}.json"
  asked = [options.preset, options.tune_updates, *options.set]
  if record.exists() and (stored := json.loads(record.read_text()))["asked"] == asked:
    return tuple(max(stored["scores"], key=stored["scores"].get).split())
  if options.report:
    return None
  found = {}
  for setting in grid_of(name):
    workdir = options.runs / "tune" / name / "-".join(s.split("=")[1] for s in setting)
    arguments = _arguments(
      name,
      options,
      f"train.num_updates={options.tune_updates}",
      f"evaluate.prompts={validation}",
      "evaluate.seed=2000",
      "evaluate.num_prompts=75",
      *setting,
    )
    if not campaign.run(workdir, arguments):  # it has diverged
      found[setting] = -1.0
      continue
    scores = campaign.scores_of(workdir)
    found[setting] = scores[scores.model == "tuned"].groupby("scorer").score.mean().sum()
  scores_by = {" ".join(setting): score for setting, score in found.items()}
  record.parent.mkdir(exist_ok=True)
  record.write_text(json.dumps({"asked": asked, "scores": scores_by}, indent=1))
  return max(found, key=found.__getitem__)


def _validation_prompts(options: argparse.Namespace) -> Path:
  """Held-out prompts that no test of this campaign uses, as a file."""
  file = options.runs.resolve() / "validation.txt"
  if not file.exists():
    test = set(shapes_prompts.held_out(150, seed=3000))
    others = [p for p in shapes_prompts.held_out(300, seed=2000) if p not in test]
    file.write_text("\n".join(others[:75]) + "\n", encoding="utf-8")
  return file


def _final(
  name: str, setting: tuple[str, ...], seed: int, options: argparse.Namespace
) -> tuple[Path, list[str]]:
  arguments = _arguments(name, options, f"seed={seed}", *setting)
  return options.runs / "final" / f"{name}-{seed}", arguments


def report(chosen: dict[str, tuple[str, ...]], options: argparse.Namespace) -> None:
  """Writes methods.md, results.json and grid.png from finished runs."""
  done = {}
  for name, setting in chosen.items():
    runs = [_final(name, setting, seed, options) for seed in options.seeds]
    if all(campaign.is_finished(*run) for run in runs):
      done[name] = [workdir for workdir, _ in runs]
  if not done:
    sys.exit("no method is finished yet")
  numbers = {name: _measure(name, chosen[name], runs, options) for name, runs in done.items()}
  first = campaign.scores_of(next(iter(done.values()))[0])
  base = first[first.model == "base"]
  numbers["base"] = {
    **{s: [float(v)] for s, v in base.groupby("scorer").score.mean().items()},
    "categories": _by_category(base),
    "vendi": [_vendi(None, options)],
  }
  options.out.mkdir(parents=True, exist_ok=True)
  (options.out / "results.json").write_text(json.dumps(numbers, indent=1) + "\n")
  text = _text(numbers, options)
  (options.out / "methods.md").write_text(text, encoding="utf-8")
  _save_grid(done, options.out / "grid.png")
  print(text)


def _measure(
  name: str, setting: tuple[str, ...], runs: list[Path], options: argparse.Namespace
) -> dict:
  scores = [campaign.scores_of(run) for run in runs]
  tuned_rows = [s[s.model == "tuned"] for s in scores]
  # Each seed's pairs count for themselves.
  together = pd.concat(s.assign(seed=s.seed + i * 10**6) for i, s in enumerate(scores))
  wins = compare.compare(together)
  key = next(k for k in wins if k.startswith("shapes.quality"))
  tune = json.loads((options.runs / "tune" / f"{name}.json").read_text())
  return {
    "setting": list(setting),
    "tuned over": tune["scores"],
    **{
      s: [float(t[t.scorer == s].score.mean()) for t in tuned_rows]
      for s in sorted(set(tuned_rows[0].scorer))
    },
    "categories": _by_category(pd.concat(tuned_rows)),
    "quality win rate": [wins[key]["win_rate"], *wins[key]["interval"]],
    "vendi": [_vendi(run, options) for run in runs],
    "minutes": [campaign.minutes_of(run) for run in runs],
  }


def _by_category(rows: pd.DataFrame) -> dict[str, float]:
  correct = rows[rows.scorer == "shapes.correct"]
  return {str(k): float(v) for k, v in correct.groupby("category").score.mean().items()}


def _vendi(workdir: Path | None, options: argparse.Namespace) -> float:
  """Diversity of pictures of one prompt, by their latents, mean over test prompts."""
  record = (workdir or options.runs) / "vendi.json"
  if record.exists():
    return json.loads(record.read_text())
  mesh = sharding.make_mesh()
  model = str(workdir) if workdir else _base(options)
  pipeline = tuned.load(model, mesh=mesh)
  generator = generate.make_generator(pipeline, mesh, num_steps=20, guidance=2.0, batch_size=40)
  prefix = tuned.prompt_prefix(model)
  prompts = [prefix + p for p in shapes_prompts.held_out(150, seed=3000)[:PROMPTS]]
  cond = encode.encode_prompts(pipeline, mesh, prompts)
  cond = jax.tree.map(lambda x: np.repeat(x, ALIKE, axis=0), cond)
  images = generator(pipeline.params["unet"], cond, np.arange(PROMPTS * ALIKE) + 9000)
  latents = encode.encode_images(pipeline, mesh, list(images)).reshape(PROMPTS, ALIKE, -1)
  score = float(np.mean([vendi.vendi_score(of) for of in latents]))
  record.write_text(json.dumps(score))
  jax.clear_caches()
  return score


def _text(numbers: dict, options: argparse.Namespace) -> str:
  base = numbers["base"]
  names = sorted(
    (n for n in numbers if n != "base"), key=lambda n: -np.mean(numbers[n]["shapes.correct"])
  )
  spread = campaign.spread
  lines = [
    "# Every method on the embedded world",
    "",
    campaign.provenance("python benchmarks/methods.py", options.seeds, options.set),
    "",
    f"Each run tunes the bundled pipeline with {IMAGES} training images at each update - rows "
    "times the images of a row that the loss compares - and the number of updates of "
    f"`configs/common.py`. Before that six settings of each method were tried, with "
    f"{options.tune_updates} updates and seed 0, on 75 validation prompts, and the one with "
    "the largest sum of correctness and quality taken; the test prompts below had no part "
    "in it. Mean +- standard deviation over seeds. The win rate is that of the tuned model's "
    "pictures over the base's by quality, all seeds together, with a 95 % interval over "
    f"prompts. Vendi scores are of {ALIKE} pictures of a prompt ({ALIKE} would be most "
    f"diverse), by the cosine of their latents, mean over {PROMPTS} prompts. Minutes are whole "
    "runs with the evaluation, on a machine that may have been shared: hints.",
    "",
    "| method | correct | quality | win rate | Vendi | minutes | lr, strength |",
    "|---|---|---|---|---|---|---|",
    f"| base | {spread(base['shapes.correct'])} | {spread(base['shapes.quality'])} | | "
    f"{base['vendi'][0]:.2f} | | |",
  ]
  for name in names:
    n = numbers[name]
    rate, low, high = n["quality win rate"]
    lines.append(
      f"| {name} | {spread(n['shapes.correct'])} | {spread(n['shapes.quality'])} "
      f"| {rate:.3f} [{low:.3f}, {high:.3f}] | {spread(n['vendi'], '{:.2f}')} "
      f"| {np.mean(n['minutes']):.1f} | {', '.join(n['setting'])} |"
    )
  categories = list(base["categories"])
  lines += ["", "Correct by category:", "", "| method | " + " | ".join(categories) + " |"]
  lines.append("|---|" + "---|" * len(categories))
  for name in ("base", *names):
    cells = (f"{numbers[name]['categories'][c]:.2f}" for c in categories)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  lines += ["", "Pictures of the first seed, same prompts and noise:", "", "![](grid.png)", ""]
  return "\n".join(lines)


def _save_grid(done: dict[str, list[Path]], path: Path) -> None:
  """A row a prompt, a column a model."""
  runs = {name: campaign.newest_evaluation(dirs[0]) for name, dirs in done.items()}
  rows = campaign.scores_of(next(iter(done.values()))[0])
  rows = rows[rows.model == "base"].drop_duplicates("seed").reset_index()
  picks = rows.iloc[np.linspace(0, len(rows) - 1, 8).astype(int)]
  load = lambda where, model, seed: np.asarray(  # noqa: E731
    Image.open(where / "images" / model / f"{seed:08d}.png")
  )
  first = next(iter(runs.values()))
  pictures = [
    [load(first, "base", s), *(load(where, "tuned", s) for where in runs.values())]
    for s in picks.seed
  ]
  size = pictures[0][0].shape[0]
  grid.image_grid(
    pictures,
    captions=list(picks.prompt),
    headers=["base", *runs],
    columns=1,
    scale=max(96 // size, 1),
  ).save(path)


if __name__ == "__main__":
  main(sys.argv[1:])
