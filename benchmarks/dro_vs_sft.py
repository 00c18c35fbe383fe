"""Comparison of DRO and SFT on the embedded world: the same experts, updates and seeds.

  python benchmarks/dro_vs_sft.py --out=docs/dro_vs_sft

The script runs `jaxpref.main` for each method and seed in `runs/dro_vs_sft/`, and writes
`results.json` and a table in `dro_vs_sft.md`. Finished runs leave records, so an interrupted
campaign resumes. `--help` lists the options.
"""

import argparse
import json
import sys

import campaign
import pandas as pd

from jaxpref.evaluation import statistics

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
  report(runs, options)


def _arguments(method: str, options: argparse.Namespace, *fields: str) -> list[str]:
  settings = (f"--config.{field}" for field in (*fields, *options.set))
  return [f"--config=configs/{method}.py:{options.preset}", *settings]


def report(runs: campaign.Campaign, options: argparse.Namespace) -> None:
  """Writes results.json and dro_vs_sft.md from records."""
  scores = {
    (method, seed): campaign.scores_of(runs, f"{method}-{seed}")
    for method in METHODS
    for seed in options.seeds
  }
  tuned = {}  # (method, scorer) -> mean by seed
  for (method, _), rows in scores.items():
    means = rows[rows.model == "tuned"].groupby("scorer").score.mean()
    for scorer, value in means.items():
      tuned.setdefault((method, scorer), []).append(float(value))
  first = scores[METHODS[0], options.seeds[0]]
  base = first[first.model == "base"].groupby("scorer").score.mean()
  # SFT takes the role of the base: pairs of the same prompt and noise, over all seeds.
  duel = pd.concat(
    rows[rows.model == "tuned"].assign(
      model="tuned" if method == "dro" else "base", seed=lambda r, s=seed: r.seed + s * 10**6
    )
    for (method, seed), rows in scores.items()
  )
  direct = statistics.compare(duel)
  text = [
    "# DRO against SFT on the embedded world",
    "",
    campaign.provenance("python benchmarks/dro_vs_sft.py", runs, options.seeds, options.set)
    + " Each run tunes the bundled pipeline on the same experts with the same number of "
    "updates, and is scored on the same held-out prompts and noise. Mean +- standard "
    "deviation over seeds.",
    "",
    "| scorer | base | " + " | ".join(m.upper() for m in METHODS) + " |",
    "|---|---|" + "---|" * len(METHODS),
  ]
  for scorer in sorted(base.index):
    cells = [campaign.spread(tuned[m, scorer]) for m in METHODS]
    text.append(f"| {scorer} | {base[scorer]:.3f} | " + " | ".join(cells) + " |")
  text += [
    "",
    "DRO's images against SFT's, pair by pair, all seeds together. Intervals and p-values "
    "are over prompts: they hold for these training runs, not for other seeds.",
    "",
    "| scorer | DRO wins | ties | SFT wins | win rate, 95 % interval | p |",
    "|---|---|---|---|---|---|",
  ]
  for key, entry in direct.items():
    low, high = entry["interval"]
    text.append(
      f"| {key} | {entry['win']:.1%} | {entry['tie']:.1%} | {entry['loss']:.1%} "
      f"| {entry['win_rate']:.3f} [{low:.3f}, {high:.3f}] | {entry['p_value']:.2g} |"
    )
  (options.out / "dro_vs_sft.md").write_text("\n".join(text) + "\n", encoding="utf-8")
  numbers = {
    "base": {k: float(v) for k, v in base.items()},
    "tuned": {f"{m}/{s}": values for (m, s), values in tuned.items()},
    "dro_against_sft": direct,
  }
  (options.out / "results.json").write_text(
    json.dumps(numbers, indent=2) + "\n", encoding="utf-8"
  )
  print("\n".join(text))


if __name__ == "__main__":
  main(sys.argv[1:])
