"""Reproduces the comparison of methods in the paper on Diffusion-DRO, from its raw data.

  python experiments/reproduce_dro.py --data=PICKAPIC --test=PARQUET --model=MODEL --out=DIR
  python experiments/reproduce_dro.py --rehearse --out=DIR
  python experiments/reproduce_dro.py --plan=h200:1

PICKAPIC is a folder with Pick-a-Pic v2's parquet files; PARQUET its test_unique split; MODEL
Stable Diffusion 1.5 in diffusers' layout or its Hub id. The five scorers' weights must be in
place, see docs/scorers.md. The steps: build the data set; score it with HPSv2; train SFT and
Diffusion-DRO on the best 500 images, SPIN on the preferred ones, Diffusion-DPO and
Diffusion-KTO on all, from the base and from the SFT model, which then is the reference; and
compare all models on the test prompts, five images each, DDPM with 50 steps at guidance 7.5. A
prompt counts with the image whose PickScore is the median of five. HPSv2 selected the experts,
so it decides nothing.

Every step is a command of jaxpref, printed before it runs; a step that was interrupted resumes.
`--rehearse` does the same with small generated files, a tiny model and random scorers, in
minutes on a CPU; its numbers mean nothing. `--plan` prints hours and memory from counts.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import steps as steps_lib  # noqa: E402
from steps import Step  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCORERS = {
  "PickScore": "pickscore.v1",
  "HPSv2": "hpsv2.v2_0",
  "Aesthetic": "aesthetic.v1_hf",
  "CLIP": "clip.h14_tensor_aa",  # as through the loader of the package hpsv2
  "ImageReward": "imagereward.v1",
}
# Means in the paper (Wu et al., 2025), Pick-a-Pic v2's test prompts, in the order of SCORERS.
# It reports CLIP as a cosine; `clip.h14` is a hundred times that.
PUBLISHED = {
  "base": (20.68, 26.88, 5.93, 33.69, 0.1765),
  "sft": (21.24, 28.11, 6.34, 32.93, 0.7623),
  "spin": (21.40, 27.78, 6.26, 33.05, 0.5619),
  "dpo-sft": (21.31, 28.08, 6.35, 33.34, 0.7912),
  "kto-sft": (21.25, 28.11, 6.34, 32.96, 0.7636),
  "dro": (21.52, 28.49, 6.40, 33.90, 0.8511),
}
RUNS = ("sft", "dpo", "dpo-sft", "kto", "kto-sft", "spin", "dro")


def make_steps(options: argparse.Namespace, scorers: Mapping[str, str]) -> list[Step]:
  """Lists the experiment's steps.

  Args:
    options: of the command line.
    scorers: the paper's name of a scorer -> its name here; HPSv2 chooses the experts.
  """
  out, data = options.out, options.out / "data"
  preset = "tiny" if options.rehearse else "sd15"
  found = [
    Step(
      "build",
      "jaxpref.data",
      ["build", "--source=pickapic", f"--path={options.data}", f"--out={data}"],
    ),
    Step("score", "jaxpref.score", [f"--path={data}", f"--scorers={scorers['HPSv2']}"]),
  ]
  top = [f"--config.data.score={scorers['HPSv2']}", "--config.data.experts=top"]
  top += [f"--config.data.num_experts={4 if options.rehearse else 500}"]
  for name in RUNS:
    method, _, start = name.partition("-")
    workdir = out / "runs" / name
    arguments = [
      f"--config={ROOT / 'configs' / f'{method}.py'}:{preset}",
      f"--workdir={workdir}",
      f"--config.model.path={options.model}",
      f"--config.data.path={data}",
      # The comparison of all models is a step of its own.
      "--config.evaluate.num_prompts=2",
      "--config.evaluate.images_per_prompt=1",
    ]
    if method in ("sft", "dro"):
      arguments += top
    if method == "spin":
      arguments.append("--config.data.experts=winners")
    if start:
      arguments.append(f"--config.model.start={out / 'runs' / start}")
    found.append(Step(name, "jaxpref.main", arguments, workdir / "report.html"))
  models = ",".join([f"base={options.model}", *(f"{n}={out / 'runs' / n}" for n in RUNS)])
  found.append(
    Step(
      "compare",
      "jaxpref.evaluate",
      [
        f"--models={models}",
        f"--prompts={options.test}",
        f"--scorers={','.join(scorers.values())}",
        f"--selected-by={scorers['HPSv2']}",
        f"--unit=median:{scorers['PickScore']}",
        "--solver=ddpm",
        f"--steps={4 if options.rehearse else 50}",
        "--guidance=7.5",
        f"--images-per-prompt={2 if options.rehearse else 5}",
        f"--out={out / 'comparison'}",
        *(steps_lib.REHEARSED if options.rehearse else steps_lib.FULL),
      ],
      out / "comparison" / "results.json",
    )
  )
  return found


def tables(results: dict[str, Any], scorers: Mapping[str, str]) -> str:
  """Formats the comparison beside the published means, in Markdown."""
  keys = {
    title: next(k for k in results["scorers"] if k.startswith(f"{name}-"))
    for title, name in scorers.items()
  }
  lines = ["| model | " + " | ".join(f"{t} (paper)" for t in keys) + " |"]
  lines.append("|---|" + "---|" * len(keys))
  models = [name for name in ("base", *RUNS) if name in results["models"]]
  for model in models:
    of, cells = results["models"][model], []
    for place, key in enumerate(keys.values()):
      paper = f"{PUBLISHED[model][place]:g}" if model in PUBLISHED else "-"
      cells.append(f"{of[key]['mean']:.3f} ± {of[key]['std_prompts']:.3f} ({paper})")
    lines.append(f"| {model} | " + " | ".join(cells) + " |")
  lines += ["", "Win rates of dro, with 95 % intervals and Holm's p of the paired t-test:", ""]
  lines.append("| against | " + " | ".join(keys) + " |")
  lines.append("|---|" + "---|" * len(keys))
  for model in models:
    if model == "dro":
      continue
    cells = [_against(results, "dro", model, key) for key in keys.values()]
    lines.append(f"| {model} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def _against(results: dict[str, Any], model: str, other: str, key: str) -> str:
  for one in results["comparisons"]:
    if {one["model"], one["baseline"]} == {model, other}:
      entry = one["scorers"][key]
      rate, (low, high) = entry["win_rate"], entry["interval"]
      if one["baseline"] == model:  # compared the other way round
        rate, low, high = 1 - rate, 1 - high, 1 - low
      p = entry["holm"] if entry["holm"] is not None else entry["p_value"]
      text = f"{100 * rate:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
      return text if p is None else f"{text}, p {p:.2g}"
  return "-"


def main() -> None:
  """Runs, rehearses or plans the experiment, as the command line says."""
  steps_lib.reproduce(
    __doc__,
    out="runs/reproduce_dro",
    scorers=SCORERS,
    make_steps=make_steps,
    tables=lambda out, scorers: tables(
      json.loads((out / "comparison" / "results.json").read_text()), scorers
    ),
  )


if __name__ == "__main__":
  steps_lib.main(main)
