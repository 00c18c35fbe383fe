"""Comparison of online methods by rewards on the embedded world, and of what they exploit.

  python benchmarks/rewards.py --out=docs/rewards

Each method trains from the defaults of its configuration until it has sampled equally many
images: by the learned reward `shapes.preference` with each seed, and, where it needs no
gradient of the reward, by the exact verifier `shapes.correct` with the first seed. LPO's reward
is a latent reward model, trained on the data with the same seed. Beside them train SFT, DPO and
DRO, which learn from data, as `methods.py` has tuned them. While it trains,
each online run looks at the learned reward and at the truth eight times. Finished runs leave
records in `docs/rewards/`, so an interrupted campaign resumes. The script writes tables of
`docs/rewards.md`, and `results.json` and `curves.png` into the folder.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import campaign
import comparison
import methods
import numpy as np
import pandas as pd
import scoring
from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.runtime import workdir as workdir_lib

LEARNED, EXACT = "shapes.preference", "shapes.correct"
IMAGES = 2048  # that the policy samples in a run of an online method
LOOKS, LOOKED = 8, 24  # during a run; prompts of a look, with two images each
ROUNDS = ("awm", "nft", "dgpo", "ppo", "prdp", "d3po", "rwr", "best_of", "online_dpo")
# Whose reward is in the program.
THROUGH = ("spo", "lpo", "draft", "draft_lv", "alignprop", "refl")
OFFLINE = ("sft", "dpo", "dro")
HEADS = {LEARNED: "learned", **comparison.TITLES}


def main(argv: list[str]) -> None:
  """Makes missing runs, seed by seed, then reports."""
  parser = campaign.make_parser(__doc__, "rewards")
  add = parser.add_argument
  add("--tuned", type=Path, default=Path("docs/methods/results.json"), help="of methods.py")
  add("--updates", type=int, default=240, help="updates of the methods that learn from data")
  add("--only", nargs="+", default=[*ROUNDS, *THROUGH, *OFFLINE], metavar="METHOD")
  options = parser.parse_args(argv)
  judges = (LEARNED, *scoring.JUDGES)
  runs = campaign.open_campaign(options, methods.arguments_of("sft", options), judges)
  base = campaign.record_base(runs)
  records: dict[tuple[str, int], Any] = {}
  for seed in options.seeds:
    for name in names_of(options):
      method, _, reward = name.partition(", ")
      if reward and seed != options.seeds[0]:
        continue
      arguments, looks = _offline_arguments, {}
      if method not in OFFLINE:
        arguments, looks = online_arguments, {"measure": _read_looks, "prompts": LOOKED}
      run = f"{method}{'-exact' if reward else ''}-{seed}"
      judge = [f"steps.judge={_judge_of(options, seed)}"] if method == "lpo" else []
      given = arguments(name, options, *judge, f"seed={seed}")
      if judge and not (runs.report_only or campaign.read_record(runs, run, given)):
        _train_judge(options, seed)
      records[name, seed] = campaign.record_run(runs, run, given, **looks)
  missing = [f"{name} {seed}" for (name, seed), record in records.items() if not record]
  if missing or not base:
    sys.exit("not finished yet: " + ", ".join(missing or [campaign.BASE]))
  report(records, base, runs, options)


def _judge_of(options: argparse.Namespace, seed: int) -> Path:
  """Returns the workdir of LPO's judge."""
  return options.runs / f"latent_reward-{seed}"


def _train_judge(options: argparse.Namespace, seed: int) -> None:
  """Trains LPO's judge on the data's pairs, unless that is done."""
  fields = (*options.set, f"seed={seed}")
  given = [f"--config=configs/latent_reward.py:{options.preset}"]
  given += [f"--config.{field}" for field in fields]
  if not campaign.run(_judge_of(options, seed), given):
    sys.exit(1)


def names_of(options: argparse.Namespace) -> list[str]:
  """Returns the methods, and those that train by the exact reward, as "awm, exact"."""
  return [*options.only, *(f"{name}, exact" for name in options.only if name in ROUNDS)]


def online_arguments(name: str, options: argparse.Namespace, *fields: str) -> list[str]:
  """Returns the arguments of a run that samples `IMAGES` images."""
  method, _, exact = name.partition(", ")
  config = config_lib.load_config(f"{method}:{options.preset}")
  section = "rounds" if "rounds" in config else "pathwise"
  updates = updates_of(config)
  settings = (
    f"{section}.scorers=('{EXACT if exact else LEARNED}',)",
    f"train.num_updates={updates}",
    f"train.updates_per_iteration={updates}",
    f"alarms.every={max(updates // LOOKS, 1)}",
    f"alarms.num_prompts={LOOKED}",
    *options.set,
    *fields,
  )
  given = (f"--config.{field}" for field in settings)
  return [f"--config=configs/{method}.py:{options.preset}", *given]


def updates_of(config: ConfigDict) -> int:
  """Returns the number of updates until the policy has sampled `IMAGES` images.

  Raises:
    ValueError: no whole number of rounds samples as many.
  """
  each, updates = config.train.batch_size, 1
  if rounds := config.get("rounds"):
    each, updates = rounds.num_prompts * rounds.images_per_prompt, rounds.updates
  if IMAGES % each:
    raise ValueError(f"{config.name}: {IMAGES} images are not whole rounds of {each}")
  return IMAGES // each * updates


def _offline_arguments(name: str, options: argparse.Namespace, *fields: str) -> list[str]:
  tuned = json.loads(options.tuned.read_text(encoding="utf-8"))["methods"]
  return methods.arguments_of(name, options, *tuned[name]["setting"], *fields)


def _read_looks(workdir: Path, images: pd.DataFrame) -> dict[str, Any]:
  """Returns 'looks': means of the base's images (update 0) and of each look at the policy."""
  del images
  looks: list[dict[str, float]] = []
  for file in sorted((workdir / "alarms").iterdir(), key=lambda file: int(file.stem)):
    look = json.loads(file.read_text(encoding="utf-8"))
    if not looks:
      looks.append({"update": 0, "kl": 0.0, **_means(look["base"])})
    about = {"update": int(file.stem), "kl": sum(map(np.mean, look["kl_by_step"]))}
    looks.append({**about, **_means(look["scores"])})
  return {"looks": looks}


def _means(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
  return {name: float(np.mean(of)) for name, of in scores.items()}


def report(
  records: Mapping[tuple[str, int], dict],
  base: dict,
  runs: campaign.Campaign,
  options: argparse.Namespace,
) -> None:
  """Writes the document's tables, results.json and curves.png from records."""
  rows = pd.concat(
    campaign.scores_of(runs, of)
    for of in (campaign.BASE, *(f"{n}-{s}" for n, s in records if ", " not in n))
  )
  together = comparison.together(rows[rows["scorer"].isin(comparison.SHOWN)])
  against = comparison.against(together, campaign.BASE)
  results = {
    "base": base["means"],
    "runs": {f"{name} {seed}": _measure(of) for (name, seed), of in records.items()},
    "against base": against,
    "judged": runs.judged,
  }
  workdir_lib.write_json(options.out / "results.json", results)
  text = _text(records, base, against, runs, options)
  campaign.write_into(campaign.document_of(options.out), text, part="campaign")
  save_curves(records, options.out / "curves.png")
  print(text)


def _measure(record: dict) -> dict[str, float]:
  looks = record.get("looks", [])
  return {
    **{title: record["means"][scorer] for scorer, title in HEADS.items()},
    **({"KL": looks[-1]["kl"]} if looks else {}),
    "minutes": record["minutes"],
  }


def _text(
  records: Mapping[tuple[str, int], dict],
  base: dict,
  against: dict[str, comparison.Entries],
  runs: campaign.Campaign,
  options: argparse.Namespace,
) -> str:
  command = "python benchmarks/rewards.py"
  lines = [
    campaign.provenance(command, runs, options.seeds, options.set),
    "",
    f"An online run samples {IMAGES} images, with the defaults of its configuration, which are "
    "not tuned on this world; SFT, DPO and DRO learn from data, with the settings that "
    f"`benchmarks/methods.py` chose, and {options.updates} updates of {methods.IMAGES} images. "
    f"`learned` is the mean reward by `{LEARNED}` of the test images; `likeness` is minus the "
    "distance of an image's patches from those of clean renders, in 1/255; `KL` is the "
    f"divergence from the base at the end, in nats an image of {LOOKED} test prompts. Minutes "
    "are of training on a machine that may have been shared.",
  ]
  for reward, title in (("", f"By the learned reward `{LEARNED}`"), ("exact", "By the truth")):
    named = [n for n in names_of(options) if n.partition(", ")[2] == reward]
    seeds = options.seeds[:1] if reward else options.seeds
    measured = {name: [_measure(records[name, seed]) for seed in seeds] for name in named}
    lines += ["", f"{title}, seeds {', '.join(map(str, seeds))}:", ""]
    lines += _table(measured, base)
  lines += [
    "",
    "By the learned reward, against the base: mean differences, with p-values of paired "
    "t-tests over prompts, whose values are means over images and seeds. They are adjusted for "
    "all tests of the table by Holm's method.",
    "",
    *comparison.table(against),
    "",
    "The learned reward against the truth: the change since the base at eight looks during "
    "training, a line for each seed; solid is `shapes.correct`, dashed `shapes.quality`.",
    "",
    f"![Correctness and quality against the learned reward]({options.out.name}/curves.png)",
    "",
  ]
  return "\n".join(lines)


def _table(measured: Mapping[str, list[dict[str, float]]], base: dict) -> list[str]:
  forms = dict.fromkeys(HEADS.values(), "{:.3f}") | {"KL": "{:.0f}", "minutes": "{:.1f}"}
  of_base = [f"{base['means'][scorer]:.3f}" for scorer in HEADS]
  lines = [
    f"| method | {' | '.join(forms)} |",
    "|---" * (len(forms) + 1) + "|",
    f"| base | {' | '.join(of_base)} | | |",
  ]
  for name, found in measured.items():
    cells = [
      campaign.spread([one[title] for one in found], form) if title in found[0] else ""
      for title, form in forms.items()
    ]
    lines.append(f"| {name.partition(', ')[0]} | {' | '.join(cells)} |")
  return lines


def save_curves(records: Mapping[tuple[str, int], dict], file: Path) -> None:
  """Plots, for each online method, the truth against the learned reward while it trains."""
  import matplotlib
  from matplotlib.figure import Figure

  shown = list(dict.fromkeys(n for n, _ in records if n in (*ROUNDS, *THROUGH)))
  columns = min(len(shown), 5)
  lines = -(-len(shown) // columns) if shown else 0
  if not lines:
    return
  with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False}):
    figure = Figure(figsize=(2.2 * columns, 2.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for panel, name in zip(panels.flat, shown, strict=False):
      panel.set_title(name)
      panel.axhline(0, color="0.7", linewidth=0.8)
      for (method, _), record in records.items():
        if method == name:
          table = pd.DataFrame(record["looks"])
          change = table - table.iloc[0]
          panel.plot(change[LEARNED], change[EXACT], color="C0", linewidth=1)
          panel.plot(change[LEARNED], change["shapes.quality"], "--", color="C1", linewidth=1)
    for panel in panels.flat[len(shown) :]:
      panel.set_visible(False)
    figure.supxlabel("change of the learned reward")
    figure.supylabel("change of the truth")
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
  main(sys.argv[1:])
