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
from collections.abc import Callable, Mapping, Sequence

import campaign
import comparison
import numpy as np
import pandas as pd

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
      runs, f"{_name(name, variant)}-{seed}", _arguments(options, f"seed={seed}", *fields)
    )
    for seed in options.seeds
    for name in options.only
    for variant, fields in ABLATIONS[name].variants.items()
  }
  report(records, runs, options)


def _arguments(options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*options.set, *fields))
  return [f"--config=configs/dro.py:{options.preset}", *settings]


def _name(name: str, variant: str) -> str:
  """Returns the name of a variant's runs, without the seed."""
  changed = ABLATIONS[name].variants[variant]
  return f"{name}-{variant.replace(' ', '')}" if changed else DEFAULT


def report(
  records: Mapping[tuple[str, str, int], dict | None],
  runs: campaign.Campaign,
  options: argparse.Namespace,
) -> None:
  """Writes one table per ablation, with the seeds of which all its runs are finished."""
  text = [
    campaign.provenance("python benchmarks/dro_ablations.py", runs, options.seeds, options.set),
    "",
    "Each run is `configs/dro.py` with one thing changed; mean +- standard deviation over "
    "seeds. `likeness` is minus the distance of an image's patches from those of clean "
    "renders, in 1/255. "
    "`active` is the share of samples that the hinge still counted, `own error` the policy's "
    "on its own samples (against the sampling copy's predictions: 0 if that copy is renewed at "
    "every update, as is its part of the gradient); both are means over logged updates. "
    "Minutes are of training, on a machine that may have been "
    "shared. Below each table, the variants against the default: mean differences, with "
    "p-values of paired t-tests over prompts, whose values are means over images and seeds, "
    "adjusted for all tests of the table by Holm's method. Whether the trend is the paper's "
    "(Wu et al. 2025, SD 1.5 on Pick-a-Pic) is judged by the sum of correctness and quality.",
  ]
  results = {}
  for name in options.only:
    ablation = ABLATIONS[name]
    of = {(v, s): records[name, v, s] for v in ablation.variants for s in options.seeds}
    seeds = [s for s in options.seeds if all(of[v, s] for v in ablation.variants)]
    if not seeds:
      print(f"{name}: no seed is finished yet")
      continue
    measured = {v: [_measure(of[v, s]) for s in seeds] for v in ablation.variants}
    compared = _against_default(name, seeds, runs)
    results[name] = {"seeds": seeds, "runs": measured, "against default": compared}
    text += ["", f"### {ablation.title}", "", f"Seeds {', '.join(map(str, seeds))}.", ""]
    text += [f"| | {' | '.join(_FORMS)} |", "|---" * (len(_FORMS) + 1) + "|"]
    for variant, fields in ablation.variants.items():
      cells = (
        campaign.spread([r[key] for r in measured[variant]], form)
        for key, form in _FORMS.items()
      )
      mark = "" if fields else " (default)"
      text.append(f"| {variant}{mark} | {' | '.join(cells)} |")
    text += ["", *comparison.table(compared), "", f"Paper: {ablation.paper}."]
    if ablation.agrees:
      sums = {
        variant: float(np.mean([r["correct"] + r["quality"] for r in found]))
        for variant, found in measured.items()
      }
      text[-1] += " Here: " + ("agrees." if ablation.agrees(sums) else "does not.")
  if not results:
    sys.exit("no seed is finished yet")
  workdir_lib.write_json(options.out / "results.json", results)
  campaign.write_into(campaign.document_of(options.out), "\n".join(text))
  print("\n".join(text))


_FORMS = {
  **dict.fromkeys(comparison.TITLES.values(), "{:.3f}"),
  "active": "{:.2f}",
  "own error": "{:.4f}",
  "minutes": "{:.1f}",
}


def _measure(record: dict) -> dict[str, float]:
  return {
    **{title: record["means"][s] for s, title in comparison.TITLES.items()},
    "active": record["metrics"]["dro/active"],
    "own error": record["metrics"]["err/policy_p"],
    "minutes": record["minutes"],
  }


def _against_default(
  name: str, seeds: Sequence[int], runs: campaign.Campaign
) -> dict[str, comparison.Entries]:
  """Compares an ablation's variants with the default, over these seeds together."""
  named = {variant: _name(name, variant) for variant in ABLATIONS[name].variants}
  rows = comparison.together(
    pd.concat(campaign.scores_of(runs, f"{of}-{s}") for of in named.values() for s in seeds)
  )
  found = comparison.against(rows, DEFAULT)
  return {variant: found[of] for variant, of in named.items() if of != DEFAULT}


if __name__ == "__main__":
  main(sys.argv[1:])
