"""Comparison of DRO and SFT on the embedded world: the same experts, updates and seeds.

  python benchmarks/dro_vs_sft.py --out=docs/dro_vs_sft

The script runs `jaxpref.main` for each method and seed in `runs/dro_vs_sft/`, and writes
`results.json` and a table in `dro_vs_sft.md`. Finished runs leave records, so an interrupted
campaign resumes. `--help` lists the options.
"""

import argparse
import sys

import campaign
import comparison
import pandas as pd

from jaxpref.runtime import workdir as workdir_lib

METHODS = ("dro", "sft")


def main(argv: list[str]) -> None:
  """Makes missing runs, then compares the methods."""
  options = campaign.make_parser(__doc__, "dro_vs_sft").parse_args(argv)
  runs = campaign.open_campaign(options, _arguments(METHODS[0], options))
  for seed in options.seeds:
    for method in METHODS:
      arguments = _arguments(method, options, f"seed={seed}")
      if not campaign.record_run(runs, f"{method}-{seed}", arguments):
        sys.exit(f"{method} with seed {seed} is not finished yet")
  if not campaign.record_base(runs):
    sys.exit("the base is not scored yet")
  report(runs, options)


def _arguments(method: str, options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*fields, *options.set))
  return [f"--config=configs/{method}.py:{options.preset}", *settings]


def report(runs: campaign.Campaign, options: argparse.Namespace) -> None:
  """Writes results.json and dro_vs_sft.md from records."""
  names = [campaign.BASE, *(f"{m}-{seed}" for m in METHODS for seed in options.seeds)]
  rows = pd.concat(campaign.scores_of(runs, name) for name in names)
  methods = comparison.together(rows)
  base = campaign.means_of(methods[methods.model == campaign.BASE])
  over = comparison.over_runs(rows, campaign.BASE)
  direct = comparison.against(methods, "sft", ["dro"])
  text = [
    "# DRO against SFT on the embedded world",
    "",
    campaign.provenance("python benchmarks/dro_vs_sft.py", runs, options.seeds, options.set)
    + " Each run tunes the bundled pipeline on the same experts with the same number of "
    "updates. Mean +- standard deviation over seeds.",
    "",
    "| | base | " + " | ".join(m.upper() for m in METHODS) + " |",
    "|---|---|" + "---|" * len(METHODS),
  ]
  for scorer, title in comparison.TITLES.items():
    cells = [comparison.spread(over[method][scorer]) for method in METHODS]
    text.append(f"| {title} | {base[scorer]:.3f} | " + " | ".join(cells) + " |")
  text += [
    "",
    "DRO against SFT, prompt by prompt: a prompt's value is the mean over its images and all "
    "seeds. Intervals and p-values, adjusted by Holm's method for the four tests, hold for "
    "these training runs, not for other seeds.",
    "",
    *comparison.table(direct),
  ]
  options.out.mkdir(parents=True, exist_ok=True)
  document = options.out / "dro_vs_sft.md"
  workdir_lib.write_text(document, "\n".join(text) + "\n")
  numbers = {"base": base, "over runs": over, "dro against sft": direct["dro"]}
  workdir_lib.write_json(options.out / "results.json", numbers)
  print("\n".join(text))


if __name__ == "__main__":
  main(sys.argv[1:])
