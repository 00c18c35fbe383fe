"""The improver, iterative DPO, SPIN and offline DPO on the embedded world.

  python benchmarks/online.py --out=docs/online

For each seed an improver is trained on the data's pairs, and with it iterative DPO, with pairs
of three sizes; beside it SPIN and offline DPO with as many updates at the same learning rate.
The first seed's improver is also drawn with at several scales, and trained without its
reconstruction task. Finished runs leave records in `docs/online/`, so that a campaign of days
goes on where it stopped, but iterative DPO's needs the improver's workdir. Writes the tables
of `docs/online.md`, and into the folder `results.json` and `improver.png`.
"""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import campaign
import jax
import numpy as np
import pandas as pd
from PIL import Image

from jaxpref import scorers, sharding, tuned
from jaxpref import workdir as workdir_lib
from jaxpref.data import encode, experts
from jaxpref.data.shapes import builder
from jaxpref.data.shapes import prompts as shapes_prompts
from jaxpref.evaluation import compare, generate

SCALES = {  # (s_T, s_I)
  "s_I": [(3.5, s) for s in (0.0, 1.0, 2.0, 3.0, 5.0)],
  "s_T": [(s, 3.0) for s in (0.0, 1.0, 2.0, 3.5, 5.0)],
}
SIZES = (50, 200, 800)  # pairs drawn in each iteration; the last is compared with others
UPDATES, ITERATIONS = 100, 3  # of an iteration; offline DPO makes all of them in one
PICTURES = 150  # prompts of a comparison by scales, one picture each
SCORERS = ("shapes.correct", "shapes.quality")


@dataclasses.dataclass(frozen=True)
class Kind:
  """A run for every seed: its configuration file and what is set there."""

  config: str
  fields: tuple[str, ...]


def kinds() -> dict[str, Kind]:
  """What is compared, by name; iterative DPO's also takes the seed's improver."""
  rate, total = "optim.lr=3e-4", UPDATES * ITERATIONS
  each = (rate, f"train.num_updates={UPDATES}", f"iterate.num_iterations={ITERATIONS}")
  return {
    "dpo": Kind("dpo", (rate, f"train.num_updates={total}", "loss.beta=2000")),
    "spin": Kind("spin", (*each, f"iterate.num_pairs={SIZES[-1]}")),
    **{
      f"iterative-{size}": Kind("iterative_dpo", (*each, f"iterate.num_pairs={size}"))
      for size in SIZES
    },
  }


def main(argv: list[str]) -> None:
  """Runs what is missing, seed by seed, then reports."""
  parser = campaign.make_parser(__doc__, "online")
  parser.add_argument("--improver-updates", type=int, default=2000, help="of every improver")
  options = parser.parse_args(argv)
  runs = campaign.open_campaign(options, _arguments("improver", options))
  records: dict[tuple[str, int], Any] = {}
  for seed in options.seeds:
    improver = f"improver-{seed}"
    records["improver", seed] = _improver(runs, improver, options, f"seed={seed}")
    for name, kind in kinds().items():
      fields = [f"seed={seed}", *kind.fields]
      if kind.config == "iterative_dpo":
        fields.append(f"iterate.improver={options.runs / improver}")
      run = f"{name}-{seed}"
      records[name, seed] = campaign.record_run(
        runs, run, _arguments(kind.config, options, *fields), _measure_policy
      )
  seed = options.seeds[0]
  without = ("loss.weight_reconstruction=0", "loss.weight_winning=0.67")
  records["without reconstruction", seed] = _improver(
    runs, f"improver-without-reconstruction-{seed}", options, f"seed={seed}", *without
  )
  if not all(records.values()):
    missing = (f"{name} {seed}" for (name, seed), record in records.items() if not record)
    sys.exit("not finished yet: " + ", ".join(missing))
  report(records, runs, options)


def _improver(
  runs: campaign.Campaign, name: str, options: argparse.Namespace, *fields: str
) -> dict | None:
  updates = f"train.num_updates={options.improver_updates}"
  arguments = _arguments("improver", options, updates, *fields)
  measure = functools.partial(_measure_improver, runs, name)
  return campaign.record_run(runs, name, arguments, measure)


def _arguments(config: str, options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*fields, *options.set))
  return [f"--config=configs/{config}.py:{options.preset}", *settings]


def train_prompts(count: int) -> list[str]:
  """Captions of the data that is trained on, its categories in turn as in the test prompts."""
  source = builder.load_preferences("train")
  captions = dict.fromkeys(experts.text_of(source[i]["caption"]) for i in range(len(source)))
  by_category: dict[str, list[str]] = {}
  for caption in captions:
    by_category.setdefault(shapes_prompts.parse(caption).category, []).append(caption)
  return [c for several in zip(*by_category.values(), strict=False) for c in several][:count]


def _measure_policy(workdir: Path) -> dict[str, Any]:
  """Scores on training prompts, and the diversity of pictures of one prompt."""
  prompts = train_prompts(PICTURES)
  _, images = _draw(str(workdir), prompts, np.arange(len(prompts)) + 5000)
  return {
    "train prompts": _scores(images, prompts),
    "vendi": campaign.diversity_of(str(workdir)),
  }


def _measure_improver(runs: campaign.Campaign, name: str, workdir: Path) -> dict[str, Any]:
  """What scales do on test prompts, and scores on training prompts."""
  model = json.loads((workdir / "config.json").read_text())["model"]["path"]
  prompts = shapes_prompts.held_out(PICTURES, seed=3000)
  seeds = np.arange(len(prompts)) + 6000
  _, shown = _draw(model, prompts, seeds)
  found: dict[str, Any] = {"base": _scores(shown, prompts)}
  for text_scale, image_scale in sorted({s for scales in SCALES.values() for s in scales}):
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
    if (text_scale, image_scale) == (3.5, 3.0):
      rows = [np.concatenate(s[:: len(s) // 8][:8], axis=1) for s in (shown, better)]
      strip = np.concatenate(rows)
      runs.records.mkdir(parents=True, exist_ok=True)
      Image.fromarray(strip).save(runs.records / f"{name}.png")
  others = train_prompts(PICTURES)
  _, shown = _draw(model, others, seeds)
  _, better = _draw(str(workdir), others, seeds + 10_000, shown=shown, scales=(3.5, 3.0))
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
  """The pipeline, and a picture of each prompt; or with `shown` the better version of each."""
  mesh = sharding.make_mesh()
  pipeline = tuned.load(model, mesh=mesh)
  generator = generate.make_generator(
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
  functions = scorers.load_scorers(SCORERS)
  return {name: float(np.mean(f(images, prompts))) for name, (_, f) in functions.items()}


def report(
  records: dict[tuple[str, int], Any], runs: campaign.Campaign, options: argparse.Namespace
) -> None:
  """Writes the document's tables, results.json and improver.png from records."""
  names = ["improver", *kinds()]
  results = {
    name: _summary(name, [records[name, seed] for seed in options.seeds], runs, options)
    for name in names
  }
  first = options.seeds[0]
  scales = records["improver", first]["scales"]
  without = records["without reconstruction", first]["scales"]
  workdir_lib.write_json(
    options.out / "results.json", {**results, "scales": scales, "without": without}
  )
  text = _text(results, scales, without, options)
  campaign.write_into(campaign.document_of(options.out), text)
  _save_grid(runs.records / f"improver-{first}.png", options.out / "improver.png")
  print(text)


def _summary(
  name: str, found: list[dict], runs: campaign.Campaign, options: argparse.Namespace
) -> dict[str, Any]:
  scores = [campaign.scores_of(runs, f"{name}-{seed}") for seed in options.seeds]
  together = pd.concat(s.assign(seed=s.seed + i * 10**6) for i, s in enumerate(scores))
  compared = compare.compare(together)
  return {
    "base": {s: found[0]["means"][f"base/{s}"] for s in SCORERS},
    **{s: [record["means"][f"tuned/{s}"] for record in found] for s in SCORERS},
    "train": {s: [record["train prompts"][s] for record in found] for s in SCORERS},
    "base, train": found[0].get("base, train prompts", {}),
    "vendi": [record["vendi"] for record in found if "vendi" in record],
    "p": {key: entry["p_value"] for key, entry in compared.items()},
    "win rate": {
      key: [entry["win_rate"], *entry["interval"]] for key, entry in compared.items()
    },
    "minutes": [record["minutes"] for record in found],
  }


def _text(results: dict, scales: dict, without: dict, options: argparse.Namespace) -> str:
  spread = campaign.spread
  correct, quality = SCORERS
  base, on_train = (results["improver"][name] for name in ("base", "base, train"))
  lines = [
    campaign.provenance("python benchmarks/online.py", options.seeds, options.set),
    "",
    "Mean +- standard deviation over seeds. Test prompts are held out; the training prompts "
    "are 150 captions of the data. Win rates are of pairs of pictures of the same prompt "
    "and noise against the base, by quality, all seeds together, with a 95 % interval over "
    "prompts; p is of a paired t-test on prompts. All but the improver are trained for "
    f"{UPDATES * ITERATIONS} updates, {UPDATES} in each of {ITERATIONS} iterations where there "
    f"are any, at the same learning rate. {campaign.DIVERSITY}",
    "",
    "| | correct | quality | correct, train | quality, train | win rate | p | Vendi |",
    "|---|---|---|---|---|---|---|---|",
    f"| base | {base[correct]:.3f} | {base[quality]:.3f} | {on_train[correct]:.3f} "
    f"| {on_train[quality]:.3f} | | | |",
  ]
  for name, r in results.items():
    key = next(k for k in r["win rate"] if k.startswith(quality))
    rate, low, high = r["win rate"][key]
    diversity = spread(r["vendi"], "{:.2f}") if r["vendi"] else ""
    lines.append(
      f"| {name} | {spread(r[correct])} | {spread(r[quality])} | {spread(r['train'][correct])} "
      f"| {spread(r['train'][quality])} | {rate:.3f} [{low:.3f}, {high:.3f}] "
      f"| {compare.p_text(r['p'][key])} | {diversity} |"
    )
  lines += [
    "",
    "`iterative-N` draws N pairs in each iteration. The improver's pictures are its versions "
    "of the base's.",
    "",
    "### What the scales do",
    "",
    f"The first seed's improver on the base's pictures of {PICTURES} test prompts, one each. "
    "Distances are root mean squares between latents: to the picture that was shown, and for "
    "comparison to that of another prompt.",
    "",
    "| s_T | s_I | correct | quality | distance | to another |",
    "|---|---|---|---|---|---|",
    f"| the base | | {scales['base'][correct]:.3f} | {scales['base'][quality]:.3f} | 0 | |",
  ]
  for title, table in (("", scales), ("without reconstruction ", without)):
    for of in SCALES.values():
      for s_t, s_i in of:
        r = table[f"{s_t:g} {s_i:g}"]
        lines.append(
          f"| {title}{s_t:g} | {s_i:g} | {r[correct]:.3f} | {r[quality]:.3f} "
          f"| {r['distance']:.3f} | {r['distance to another']:.3f} |"
        )
  lines += [
    "",
    "The base's pictures above, the improver's versions below (s_T = 3.5, s_I = 3):",
    "",
    f"![]({options.out.name}/improver.png)",
    "",
  ]
  return "\n".join(lines)


def _save_grid(strip: Path, path: Path) -> None:
  with Image.open(strip) as image:
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
  main(sys.argv[1:])
