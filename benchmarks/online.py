"""Comparison of the improver, iterative DPO, SPIN and offline DPO on the embedded world.

  python benchmarks/online.py --out=docs/online

For each seed the script trains an improver on the data's pairs, generates with it at several
scales, and uses it to train iterative DPO, with three numbers of pairs. For comparison it
trains SPIN and offline DPO with equal numbers of updates. Learning rate and beta are the best
of six on validation prompts; those of SPIN and offline DPO come from `methods.py`. A second
improver per seed has no reconstruction task. More updates are tried with the first seed only.
Finished runs leave records in `docs/online/`, so an interrupted campaign resumes, but iterative
DPO needs the improver's workdir. The script writes the tables of `docs/online.md`, and
`results.json` and `improver.png` into the folder.
"""

import argparse
import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import campaign
import comparison
import jax
import numpy as np
import pandas as pd
import scoring
from PIL import Image

from jaxpref import scorers, sharding
from jaxpref.data import encode, top_k
from jaxpref.data import generated_pairs as pairs_lib
from jaxpref.evaluation import sampling
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.shapes import builder
from jaxpref.shapes import prompts as shapes_prompts
from jaxpref.training import load_run

SCALES = {  # (s_T, s_I)
  "s_I": [(3.5, s) for s in (0.0, 1.0, 2.0, 3.0, 5.0)],
  "s_T": [(s, 3.0) for s in (0.0, 1.0, 2.0, 3.5, 5.0)],
}
CHOSEN = scoring.SCALES  # the scales of improvers in iterative DPO and the evaluation
SIZES = (20, 100, 500)  # pairs generated per iteration; the last is compared with others
UPDATES, ITERATIONS = 50, 3  # updates per iteration; offline DPO makes all in one iteration
RATES, BETAS = (3e-5, 1e-4, 3e-4), (200.0, 2000.0)
GRID = [(f"optim.lr={rate}", f"loss.beta={beta}") for beta in BETAS for rate in RATES]
PICTURES = 150  # images per comparison by scales, or on training prompts


@dataclasses.dataclass(frozen=True)
class Kind:
  """A run for every seed: its configuration file and what is set there.

  `pairs` is the number of pairs generated per iteration. `setting` is learning rate and beta;
  if it is empty, the best of `GRID` is taken. `start` is the kind whose run of the same seed
  it starts from. `fields` are further settings. `improver` is the improver that generates its
  winners.
  """

  config: str
  pairs: int = 0
  setting: tuple[str, ...] = ()
  start: str = ""
  fields: tuple[str, ...] = ()
  improver: str = "improver"


SPIN = ("optim.lr=0.0001", "loss.beta=200.0")
# The images that the improver learns to generate; SPIN's default is the best 500 of all.
PREFERRED = ("data.experts=winners", "data.num_experts=0")
LARGEST = f"iterative-{SIZES[-1]}"
WITHOUT = "without reconstruction"
IMPROVERS = {  # by improver: its settings, in addition to the scales
  "improver": (),
  WITHOUT: ("loss.weight_reconstruction=0", "loss.weight_winning=0.67"),
}
KINDS = {
  "dpo": Kind("dpo", 0, ("optim.lr=0.0003", "loss.beta=500.0")),
  "spin": Kind("spin", SIZES[-1], SPIN, fields=PREFERRED),
  "spin, experts": Kind("spin", SIZES[-1], SPIN),
  **{f"iterative-{size}": Kind("iterative_dpo", size) for size in SIZES},
  "spin, then spin": Kind("spin", SIZES[-1], SPIN, start="spin", fields=PREFERRED),
  "spin, then iterative": Kind("iterative_dpo", SIZES[-1], start="spin"),
  f"{LARGEST}, {WITHOUT}": Kind("iterative_dpo", SIZES[-1], improver=WITHOUT),
}
LONGER = (f"train.num_updates={4 * UPDATES}",)
TRIED = {  # with the first seed only
  f"iterative-{size}, {4 * UPDATES} updates": Kind("iterative_dpo", size, fields=LONGER)
  for size in (SIZES[0], SIZES[-1])
}


def main(argv: list[str]) -> None:
  """Makes missing runs, seed by seed, then reports."""
  parser = campaign.make_parser(__doc__, "online")
  add = parser.add_argument
  add("--improver-updates", type=int, default=2000, help="updates per improver")
  add("--only", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
  add("--tried", nargs="*", default=list(TRIED), choices=TRIED, metavar="KIND")
  options = parser.parse_args(argv)
  runs = campaign.open_campaign(options, _arguments("improver", options))
  records: dict[tuple[str, int], Any] = {}
  base = campaign.record_base(runs)
  for seed in options.seeds:
    for name in IMPROVERS:
      records[name, seed] = _improver(runs, name, options, seed)
    for name in options.only:
      arguments = arguments_of(name, runs, options, seed)
      records[name, seed] = arguments and campaign.record_run(
        runs, run_of(name, seed), arguments, _measure_policy
      )
  seed = options.seeds[0]
  for name in options.tried:
    arguments = arguments_of(name, runs, options, seed)
    records[name, seed] = arguments and campaign.record_run(
      runs, run_of(name, seed), arguments, _measure_policy
    )
  missing = [] if base else [campaign.BASE]
  missing += [f"{name} {seed}" for (name, seed), record in records.items() if not record]
  if missing:
    sys.exit("not finished yet: " + ", ".join(missing))
  report(records, runs, options)


def duels() -> list[tuple[str, str]]:
  """Returns the pairs of kinds to compare."""
  others = [name for name in KINDS if name != LARGEST and WITHOUT not in name]
  iterative = [(LARGEST, name) for name in others if not KINDS[name].start]
  after_spin = [
    ("spin, then iterative", other) for other in ("spin", "spin, then spin", LARGEST)
  ]
  without = [(f"{LARGEST}, {WITHOUT}", other) for other in ("dpo", "spin", LARGEST)]
  return iterative + after_spin + without


def run_of(name: str, seed: int) -> str:
  """Returns the name of an improver's or a kind's run, for files."""
  name = f"improver, {WITHOUT}" if name == WITHOUT else name
  return f"{name.replace(', then', '').replace(', ', '-').replace(' ', '-')}-{seed}"


def arguments_of(
  name: str, runs: campaign.Campaign, options: argparse.Namespace, seed: int
) -> list[str] | None:
  """Returns a run's arguments; None if its setting is unknown and no runs may be made."""
  kind = (KINDS | TRIED)[name]
  setting = kind.setting or campaign.choose(
    runs, "iterative", _kind_arguments(LARGEST, options, options.seeds[0]), GRID
  )
  return setting and [
    *_kind_arguments(name, options, seed),
    *(f"--config.{field}" for field in (f"seed={seed}", *setting)),
    *([f"--config.model.start={options.runs / f'{kind.start}-{seed}'}"] if kind.start else []),
  ]


def _kind_arguments(name: str, options: argparse.Namespace, seed: int) -> list[str]:
  """Returns all arguments except the seed and the setting."""
  kind = (KINDS | TRIED)[name]
  if not kind.pairs:
    return _arguments(kind.config, options, f"train.num_updates={UPDATES * ITERATIONS}")
  fields = [
    f"train.num_updates={UPDATES}",
    f"iterate.num_iterations={ITERATIONS}",
    f"iterate.num_pairs={kind.pairs}",
  ]
  if kind.config == "iterative_dpo":
    improver = options.runs / run_of(kind.improver, seed)
    fields += [f"iterate.improver={improver}", *_by_scales()]
  return _arguments(kind.config, options, *fields, *kind.fields)


def _by_scales() -> list[str]:
  text, image = CHOSEN
  return [f"improve.text_guidance={text}", f"improve.image_guidance={image}"]


def _improver(
  runs: campaign.Campaign, name: str, options: argparse.Namespace, seed: int
) -> dict | None:
  updates = f"train.num_updates={options.improver_updates}"
  fields = (updates, *_by_scales(), f"seed={seed}", *IMPROVERS[name])
  file = run_of(name, seed)
  measure = functools.partial(_measure_improver, runs, file)
  arguments = _arguments("improver", options, *fields)
  return campaign.record_run(runs, file, arguments, measure, improves=campaign.BASE)


def _arguments(config: str, options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*fields, *options.set))
  return [f"--config=configs/{config}.py:{options.preset}", *settings]


def train_prompts(count: int) -> list[str]:
  """Returns captions of the training data, with categories in turn as in the test prompts."""
  source = builder.load_preferences("train")
  captions = dict.fromkeys(top_k.text_of(source[i]["caption"]) for i in range(len(source)))
  by_category: dict[str, list[str]] = {}
  for caption in captions:
    by_category.setdefault(shapes_prompts.parse(caption).category, []).append(caption)
  return [c for several in zip(*by_category.values(), strict=False) for c in several][:count]


def _measure_policy(workdir: Path, images: pd.DataFrame) -> dict[str, Any]:
  """Measures scores on training prompts and of generated pairs."""
  prompts = train_prompts(PICTURES)
  _, images = _draw(str(workdir), prompts, np.arange(len(prompts)) + 5000)
  return {
    "train prompts": _scores(images, prompts),
    "pairs": [_scores_of_pairs(pairs) for pairs in sorted(workdir.glob("pairs/*"))],
  }


def _scores_of_pairs(directory: Path) -> dict[str, dict[str, float]]:
  """Scores the winners and the losers of an iteration."""
  pairs = pairs_lib.open_pairs(directory)
  rows = [pairs[i] for i in range(len(pairs))]
  prompts = [top_k.text_of(row["caption"]) for row in rows]
  scores = {}
  for side, column in (("winners", "jpg_0"), ("losers", "jpg_1")):
    images = [np.asarray(Image.open(io.BytesIO(row[column]))) for row in rows]
    scores[side] = _scores(np.stack(images), prompts)
  return scores


def _measure_improver(
  runs: campaign.Campaign, name: str, workdir: Path, drawn: pd.DataFrame
) -> dict[str, Any]:
  """Measures the influence of the scales, and scores on training prompts."""
  model = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["model"]["path"]
  prompts = list(itertools.islice(itertools.cycle(campaign.validation_prompts()), PICTURES))
  seeds = np.arange(len(prompts)) + 6000
  _, shown = _draw(model, prompts, seeds)
  found: dict[str, Any] = {"base": _scores(shown, prompts)}
  scanned = {CHOSEN, *(s for scales in SCALES.values() for s in scales)}
  for text_scale, image_scale in sorted(scanned):
    pipeline, better = _draw(
      str(workdir), prompts, seeds + 10_000, shown=shown, scales=(text_scale, image_scale)
    )
    latents = [
      encode.encode_images(pipeline, sharding.make_mesh(), list(images))
      for images in (shown, better)
    ]
    apart = lambda a, b: float(np.sqrt(np.mean((a - b) ** 2, axis=(1, 2, 3))).mean())  # noqa: E731
    found[f"{text_scale:g} {image_scale:g}"] = {
      **_scores(better, prompts),
      "distance": apart(latents[1], latents[0]),
      "distance to another": apart(latents[1], np.roll(latents[0], 1, axis=0)),
    }
    if (text_scale, image_scale) == CHOSEN:
      rows = [np.concatenate(s[:: len(s) // 8][:8], axis=1) for s in (shown, better)]
      strip = np.concatenate(rows)
      runs.records.mkdir(parents=True, exist_ok=True)
      Image.fromarray(strip).save(runs.records / f"{name}.png")
  others = train_prompts(PICTURES)
  _, shown = _draw(model, others, seeds)
  _, better = _draw(str(workdir), others, seeds + 10_000, shown=shown, scales=CHOSEN)
  return {
    "scales": found,
    "train prompts": _scores(better, others),
    "base, train prompts": _scores(shown, others),
  }


def _draw(
  model: str,
  prompts: list[str],
  seeds: np.ndarray,
  *,
  shown: np.ndarray | None = None,
  scales: tuple[float, float] = (2.0, 0.0),
) -> tuple[Any, np.ndarray]:
  """Generates an image per prompt, or improves those `shown`; also returns the pipeline."""
  mesh = sharding.make_mesh()
  pipeline = load_run.load(model, mesh=mesh)
  generator = sampling.make_generator(
    pipeline,
    mesh,
    num_steps=20,
    guidance=scales[0],
    batch_size=50,
    image_guidance=None if shown is None else scales[1],
  )
  cond = dict(encode.encode_prompts(pipeline, mesh, prompts))
  if shown is not None:
    cond["image"] = encode.encode_images(pipeline, mesh, list(shown))
  images = generator(pipeline.params["unet"], cond, seeds)
  jax.clear_caches()
  return pipeline, images


def _scores(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
  functions = scorers.load_scorers(campaign.SCORERS)
  return {name: float(np.mean(f(images, prompts))) for name, (_, f) in functions.items()}


def report(
  records: dict[tuple[str, int], Any], runs: campaign.Campaign, options: argparse.Namespace
) -> None:
  """Writes the document's tables, results.json and improver.png from records."""
  of = lambda name: [records[name, seed] for seed in options.seeds]  # noqa: E731
  first = options.seeds[0]
  names, tried = (*IMPROVERS, *options.only), (*options.only, *options.tried)
  rows = _rows(names, runs, options.seeds)
  of_first = _rows(tried, runs, [first])
  beside = [(name, other) for name in options.tried for other in ("dpo", "spin", LARGEST)]
  results: dict[str, Any] = {
    "base": campaign.means_of(campaign.scores_of(runs, campaign.BASE))
    | {"train": of(next(iter(IMPROVERS)))[0]["base, train prompts"]},
    "means": {name: _summary(of(name)) for name in names},
    "against base": comparison.against(rows, campaign.BASE),
    "duels": _duels(rows, duels(), options.only),
    "first seed": {
      "means": {name: _summary([records[name, first]]) for name in tried},
      "against base": comparison.against(of_first, campaign.BASE),
      "duels": _duels(of_first, beside, tried),
    },
  }
  results["tuned over"] = campaign.grid_scores(runs, "iterative")
  results["scales"] = {
    name: _over_seeds([record["scales"] for record in of(name)]) for name in IMPROVERS
  }
  workdir_lib.write_json(options.out / "results.json", results)
  text = _text(results, runs, options)
  campaign.write_into(campaign.document_of(options.out), text)
  _save_grid(runs.records / f"improver-{first}.png", options.out / "improver.png")
  print(text)


def _rows(names: Sequence[str], runs: campaign.Campaign, seeds: Sequence[int]) -> pd.DataFrame:
  """Returns the rows of the base and of improvers or kinds, as means over their seeds."""
  tables = [campaign.scores_of(runs, campaign.BASE)]
  for name in names:
    of = pd.concat(campaign.scores_of(runs, run_of(name, seed)) for seed in seeds)
    tables.append(comparison.together(of).assign(model=name))
  return pd.concat(tables)


def _summary(found: list[dict]) -> dict[str, Any]:
  return {
    **{s: [record["means"][s] for record in found] for s in comparison.SHOWN},
    "train": {s: [record["train prompts"][s] for record in found] for s in campaign.SCORERS},
    "pairs": _mean_pairs([pairs for record in found for pairs in record.get("pairs", [])]),
    "minutes": [record["minutes"] for record in found],
  }


def _mean_pairs(pairs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
  """Averages over iterations and seeds, by side and scorer; empty without pairs."""
  return {
    side: {s: float(np.mean([of[side][s] for of in pairs])) for s in campaign.SCORERS}
    for side in (pairs[0] if pairs else ())
  }


def _duels(
  rows: pd.DataFrame, pairs: list[tuple[str, str]], there: Sequence[str]
) -> dict[str, comparison.Entries]:
  """Compares those pairs of kinds that are there, on the same prompts and noise."""
  chosen = [pair for pair in pairs if set(pair) <= set(there)]
  compared = comparison.compare_pairs(rows, chosen)
  return {f"{name} against {other}": entries for (name, other), entries in compared.items()}


def _over_seeds(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
  """Averages over seeds what was measured by scales."""
  return {
    key: {name: float(np.mean([f[key][name] for f in found])) for name in found[0][key]}
    for key in found[0]
  }


def _text(results: dict, runs: campaign.Campaign, options: argparse.Namespace) -> str:
  setting = max(results["tuned over"], key=results["tuned over"].__getitem__)
  first = results["first seed"]
  lines = [
    campaign.provenance("python benchmarks/online.py", runs, options.seeds, options.set),
    "",
    f"Improvers make {options.improver_updates} updates of 64 rows; all others "
    f"{UPDATES * ITERATIONS} of 32 pairs, {UPDATES} in each of {ITERATIONS} iterations where "
    "there are any, with the learning rate and beta that were best on validation prompts "
    f"(iterative DPO: {setting}, of {len(results['tuned over'])} settings; those of the others "
    "in methods.md, of six). Mean +- standard deviation over seeds. `likeness` is minus the "
    "distance of an image's patches from those of clean renders, in 1/255. The training "
    f"prompts are {PICTURES} captions of the data.",
    "",
    *_means_table(results["base"], results["means"]),
    "",
    "Against the base: mean differences, with p-values of paired t-tests over prompts, whose "
    "values are means over images and seeds, adjusted by Holm's method for all tests of the "
    "table. The rate counts the prompts that win by quality, with a 95 % interval.",
    "",
    *comparison.table(results["against base"]),
    "",
    "`iterative-N` generates N pairs in each iteration, all others the same number as the "
    "largest. Runs that start from spin's model make the same number of updates again. "
    "Improvers' images are their versions of the base's; the second improver, "
    f"`{WITHOUT}`, was trained only for the other two tasks, and generates the last run's "
    "winners.",
    "",
    "One against another, in the same way:",
    "",
    *comparison.table(results["duels"]),
    "",
    "### What was trained on",
    "",
    "Scores of the pairs that runs generated, mean over iterations and seeds.",
    "",
    *_pairs_table({name: results["means"][name]["pairs"] for name in options.only}),
  ]
  if options.tried:
    lines += [
      "",
      f"### Tried with seed {options.seeds[0]}",
      "",
      f"{4 * UPDATES} updates in each iteration, beside the same seed's runs of above.",
      "",
      *_means_table(results["base"], first["means"]),
      "",
      *comparison.table(first["against base"] | first["duels"]),
      "",
      "Their pairs:",
      "",
      *_pairs_table({name: first["means"][name]["pairs"] for name in options.tried}),
    ]
  return "\n".join([*lines, "", *_scales_text(results["scales"], options), ""])


def _scales_text(scales: dict, options: argparse.Namespace) -> list[str]:
  correct, quality = campaign.SCORERS
  lines = [
    "### What the scales do",
    "",
    f"Improvers on {PICTURES} of the base's images of validation prompts; means over seeds. "
    "Distances are root mean squares between latents: to the input image and, for comparison, "
    "to another one.",
    "",
    "| s_T | s_I | correct | quality | distance | to another |",
    "|---|---|---|---|---|---|",
  ]
  shown = scales["improver"]["base"]
  lines.append(f"| the base | | {shown[correct]:.3f} | {shown[quality]:.3f} | 0 | |")
  for name, table in scales.items():
    title = "" if name == "improver" else "without: "
    for of in SCALES.values():
      for s_t, s_i in of:
        r = table[f"{s_t:g} {s_i:g}"]
        lines.append(
          f"| {title}{s_t:g} | {s_i:g} | {r[correct]:.3f} | {r[quality]:.3f} "
          f"| {r['distance']:.3f} | {r['distance to another']:.3f} |"
        )
  return [
    *lines,
    "",
    f"The base's images above, the first improver's versions below (s_T = {CHOSEN[0]:g}, "
    f"s_I = {CHOSEN[1]:g}):",
    "",
    f"![]({options.out.name}/improver.png)",
  ]


def _means_table(base: dict[str, Any], means: dict[str, dict[str, Any]]) -> list[str]:
  titles = [*comparison.TITLES.values(), "correct, train", "quality, train"]
  lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
  for name, of in {"base": base, **means}.items():
    values = [*(of[s] for s in comparison.SHOWN), *(of["train"][s] for s in campaign.SCORERS)]
    cells = (campaign.spread(np.atleast_1d(value)) for value in values)
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return lines


def _pairs_table(by_kind: dict[str, dict[str, Any]]) -> list[str]:
  lines = [
    "| | winners: correct | quality | losers: correct | quality |",
    "|---|---|---|---|---|",
  ]
  for name, pairs in by_kind.items():
    if pairs:
      sides = ("winners", "losers")
      numbers = [f"{pairs[side][s]:.3f}" for side in sides for s in campaign.SCORERS]
      lines.append(f"| {name} | {' | '.join(numbers)} |")
  return lines


def _save_grid(strip: Path, path: Path) -> None:
  with Image.open(strip) as image:
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
  main(sys.argv[1:])
