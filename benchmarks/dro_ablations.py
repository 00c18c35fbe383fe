"""Diffusion-DRO's ablations on the embedded world, compared with the paper's results.

  python benchmarks/dro_ablations.py --out=docs/dro

Every run is `configs/dro.py` with one thing changed: margin, number of experts, how often the
sampling copy is renewed, the sampler, states kept of a trajectory, replay of earlier updates.
Finished runs leave records, so an interrupted campaign resumes. All runs of the first seed come
before the second seed's. The script writes the tables of `docs/dro.md`, and `results.json` into
the folder.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping

import campaign
import numpy as np

from jaxpref.runtime import workdir as workdir_lib

Scores = Mapping[str, float]  # by variant: correctness plus quality, mean over seeds


@dataclasses.dataclass(frozen=True)
class Ablation:
  """One thing changed: fields by variant (none for the default), and the paper's trend."""

  title: str
  variants: Mapping[str, tuple[str, ...]]
  paper: str
  agrees: Callable[[Scores], bool] | None = None


def _best_within(scores: Scores) -> bool:
  """Returns whether the best variant is neither the first nor the last."""
  names = list(scores)
  return max(names, key=scores.__getitem__) not in (names[0], names[-1])


DEFAULT = "default"
ABLATIONS = {
  "margin": Ablation(
    "Margin m",
    {
      "0": ("loss.margin=0.0",),
      "1e-4": ("loss.margin=1e-4",),
      "1e-3": ("loss.margin=1e-3",),
      "1e-2": ("loss.margin=1e-2",),
      "5e-2": (),
      "1e-1": ("loss.margin=1e-1",),
      "1": ("loss.margin=1.0",),
    },
    "best between the ends: PickScore 21.13 at 0, 21.54 at 1e-3, 21.37 at 1",
    _best_within,
  ),
  "experts": Ablation(
    "Experts K",
    {
      "100": ("data.num_experts=100",),
      "500": (),
      "1000": ("data.num_experts=1000",),
      "5000": ("data.num_experts=5000",),
    },
    "few are better: PickScore 21.55 (100), 21.54 (500), 21.46 (1000), 21.25 (5000)",
    lambda scores: max(scores["100"], scores["500"]) > max(scores["1000"], scores["5000"]),
  ),
  "refresh": Ablation(
    "Updates between renewals of the sampling copy",
    {
      "1": (),
      "2": ("rollout.refresh_every=2",),
      "4": ("rollout.refresh_every=4",),
      "8": ("rollout.refresh_every=8",),
      "16": ("rollout.refresh_every=16",),
      "50": ("rollout.refresh_every=50",),
      "never": ("rollout.refresh_every=100000",),
    },
    "not examined: 1 throughout",
  ),
  "sampler": Ablation(
    "Sampler and steps",
    {
      "DPM-Solver++, 10": (),
      "DPM-Solver++, 20": ("rollout.num_steps=20",),
      "DDPM, 50": ("rollout.solver=ddpm", "rollout.num_steps=50"),
    },
    "DPM-Solver++ with 20 steps is as good as DDPM with 50 (PickScore 21.54 and 21.50), in "
    "25.7 hours for 46.3",
    lambda scores: scores["DPM-Solver++, 20"] > scores["DDPM, 50"] - 0.02,
  ),
  "states": Ablation(
    "States kept of a trajectory, with equal numbers of trained images",
    {
      "1": (),
      "2": ("rollout.states=2", "train.batch_size=16"),
      "4": ("rollout.states=4", "train.batch_size=8"),
    },
    "not examined: its code keeps one",
  ),
  "replay": Ablation(
    "Earlier updates whose samples are trained on again",
    {"0": (), "10": ("rollout.replay=10",), "100": ("rollout.replay=100",)},
    "a remark that a replay buffer hurt, with no numbers",
    lambda scores: scores["0"] == max(scores.values()),
  ),
}


def main(argv: list[str]) -> None:
  """Makes missing runs, seed by seed, then reports."""
  parser = campaign.make_parser(__doc__, "dro")
  add = parser.add_argument
  add("--only", nargs="+", default=list(ABLATIONS), choices=ABLATIONS, metavar="ABLATION")
  options = parser.parse_args(argv)
  runs = campaign.open_campaign(options, _arguments(options))
  records = {
    (name, variant, seed): campaign.record_run(
      runs, _name(name, variant, seed), _arguments(options, f"seed={seed}", *fields)
    )
    for seed in options.seeds
    for name in options.only
    for variant, fields in ABLATIONS[name].variants.items()
  }
  report(records, runs, options)


def _arguments(options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*options.set, *fields))
  return [f"--config=configs/dro.py:{options.preset}", *settings]


def _name(name: str, variant: str, seed: int) -> str:
  changed = ABLATIONS[name].variants[variant]
  place = f"{name}-{variant.replace(' ', '')}" if changed else DEFAULT
  return f"{place}-{seed}"


def report(
  records: Mapping[tuple[str, str, int], dict | None],
  runs: campaign.Campaign,
  options: argparse.Namespace,
) -> None:
  """Writes one table per ablation, with the seeds of which all its runs are finished."""
  text = [
    campaign.provenance("python benchmarks/dro_ablations.py", runs, options.seeds, options.set),
    "",
    "Each run is `configs/dro.py` with one thing changed. Correctness and quality of the "
    "tuned model's images on held-out prompts, mean +- standard deviation over seeds; "
    "`active` is the share of samples that the hinge still counted, `own error` the policy's "
    "on its own samples (against the sampling copy's predictions: 0 if that copy is renewed at "
    "every update, as is its part of the gradient); both are means over logged updates. "
    "Minutes are of whole runs with their evaluation, on a machine that may have been "
    "shared. Whether the trend is the paper's (Wu et al. 2025, SD 1.5 on Pick-a-Pic) is judged "
    "by the sum of correctness and quality.",
  ]
  results = {}
  for name in options.only:
    ablation = ABLATIONS[name]
    of = {(v, s): records[name, v, s] for v in ablation.variants for s in options.seeds}
    seeds = [s for s in options.seeds if all(of[v, s] for v in ablation.variants)]
    if not seeds:
      print(f"{name}: no seed is finished yet")
      continue
    text += ["", f"### {ablation.title}", "", f"Seeds {', '.join(map(str, seeds))}.", ""]
    text += ["| | correct | quality | active | own error | minutes |", "|---|" + "---|" * 5]
    sums = {}
    for variant, fields in ablation.variants.items():
      runs = [_measure(of[variant, seed]) for seed in seeds]
      results[f"{name}/{variant}"] = runs
      sums[variant] = float(np.mean([r["correct"] + r["quality"] for r in runs]))
      cells = (
        campaign.spread([r[key] for r in runs], form)
        for key, form in (
          ("correct", "{:.3f}"),
          ("quality", "{:.3f}"),
          ("active", "{:.2f}"),
          ("own error", "{:.4f}"),
          ("minutes", "{:.1f}"),
        )
      )
      mark = "" if fields else " (default)"
      text.append(f"| {variant}{mark} | {' | '.join(cells)} |")
    text += ["", f"Paper: {ablation.paper}."]
    if ablation.agrees:
      text[-1] += " Here: " + ("agrees." if ablation.agrees(sums) else "does not.")
  if not results:
    sys.exit("no seed is finished yet")
  workdir_lib.write_json(options.out / "results.json", results)
  campaign.write_into(campaign.document_of(options.out), "\n".join(text))
  print("\n".join(text))


def _measure(record: dict) -> dict[str, float]:
  return {
    "correct": record["means"]["tuned/shapes.correct"],
    "quality": record["means"]["tuned/shapes.quality"],
    "active": record["metrics"]["dro/active"],
    "own error": record["metrics"]["err/policy_p"],
    "minutes": record["minutes"],
  }


if __name__ == "__main__":
  main(sys.argv[1:])
