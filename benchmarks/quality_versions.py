"""Comparison of the versions of `shapes.quality` on the same images, and its scores of flaws.

  python benchmarks/quality_versions.py

docs/shapes/records.parquet has images of each method from a campaign of benchmarks/methods.py
that was scored by version 1. The script scores them again. It also scores clean renders, the
same scenes with one flaw each, and images of the corpus, whose flaws and utility for the
simulated annotator are known, at both sizes. It writes the three tables into docs/shapes.md.
"""

import datetime
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import campaign
import methods
import numpy as np
import pandas as pd
import records
from PIL import Image, ImageEnhance

from jaxpref.scorers import load_scorers
from jaxpref.shapes import annotator, flaws, prompts, render, verifier

RECORDS, DOCUMENT = Path("docs/shapes/records.parquet"), Path("docs/shapes.md")
SCORER, FIRST = "shapes.quality", "1"
CLEAN = 0.5  # an image of the base counts as clean from this score on
SCENES, SEED = 60, 0  # of the table of flaws
STEP = 0.001  # smaller changes of a score do not count
AGREEMENT = 1500  # images of the corpus in the table of agreement


def main() -> None:
  """Writes the tables."""
  write_versions()
  write_flaws()
  write_agreement()


def write_versions() -> None:
  """Writes the table of methods by version."""
  version, score = load_scorers([SCORER])[SCORER]
  with tempfile.TemporaryDirectory() as directory:
    records.unpack(RECORDS, Path(directory))
    strips = sorted(Path(directory).glob("*.png"))
    rows = pd.concat(_score(file, score) for file in strips)
  table = rows.groupby("method").agg(
    n=("new", "size"),
    old=("old", "mean"),
    new=("new", "mean"),
    error=("new", "sem"),
  )
  base = rows[rows.method == "base"]
  clean = base[base.new >= CLEAN].place
  on_clean = rows[rows.place.isin(clean)].groupby("method").new.mean()
  best = rows[rows.method == "sft"].set_index(["seed", "place"])
  lines = [
    f"Made by `python benchmarks/quality_versions.py` on {datetime.date.today()}: mean of "
    f"{SCORER} by version over the same images of a campaign of 2026-11-25 "
    f"([every method](methods.md)), {methods.SHOWN} test prompts by seed; +- is the standard "
    f"error over images. *To SFT* is version {version}'s mean difference from SFT's image of "
    f"the same prompt, noise and seed; the last column its mean on the {len(clean)} prompts of "
    f"which the base's image scores at least {CLEAN}.",
    "",
    f"| method | n | version {FIRST} | version {version} | to SFT | where the base is clean |",
    "|---|---|---|---|---|---|",
  ]
  for name, row in table.sort_values("new", ascending=False).iterrows():
    own = rows[rows.method == name].set_index(["seed", "place"])
    lost = (own.new - best.new).dropna() if name not in ("base", "sft") else []
    change = f"{lost.mean():+.3f} +- {lost.sem():.3f}" if len(lost) else ""
    lines.append(
      f"| {name} | {row.n:.0f} | {row.old:.3f} | {row.new:.3f} +- {row.error:.3f} | {change} "
      f"| {on_clean[name]:.3f} |"
    )
  campaign.write_into(DOCUMENT, "\n".join(lines))
  print("\n".join(lines))


def write_flaws() -> None:
  """Writes the table of clean renders and flaws."""
  scored = score_flaws(SCENES)
  lines = [
    f"{_made()}: means over {SCENES} scenes of test "
    f"prompts, seed {SEED}. *Falls* and *rises* count images that differ by more than {STEP} "
    "from the clean render of their scene.",
    "",
    "| image | 64 pixels | falls | rises | 32 pixels | falls | rises |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, sizes in scored.items():
    cells = []
    for values, clean in zip(sizes, scored["clean"], strict=True):
      lower, higher = np.mean(values < clean - STEP), np.mean(values > clean + STEP)
      shares = ["", ""] if name == "clean" else [f"{100 * x:.0f} %" for x in (lower, higher)]
      cells += [f"{values.mean():.3f}", *shares]
    lines.append(f"| {' | '.join([name, *cells])} |")
  campaign.write_into(DOCUMENT, "\n".join(lines), "flaws")
  print("\n".join(lines))


def score_flaws(count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns scores of the same `count` scenes by flaw, at 64 and at 32 pixels."""
  rng = np.random.default_rng(SEED)
  specs = [prompts.draw_prompt(rng, "test") for _ in range(count)]

  def render_all(looks: tuple[str, ...]) -> list[np.ndarray]:
    seeds = [[SEED, i] for i in range(count)]
    scenes = [
      flaws.flawed_scene(spec, looks, np.random.default_rng(seed))
      for spec, seed in zip(specs, seeds, strict=True)
    ]
    return [
      render.draw(scene, np.random.default_rng(seed))
      for scene, seed in zip(scenes, seeds, strict=True)
    ]

  def both(images: list[np.ndarray], change: Callable = lambda image: image):
    halves = [np.asarray(Image.fromarray(image).reduce(2)) for image in images]
    return tuple(
      np.array([verifier.visual_quality(change(image)) for image in of])
      for of in (images, halves)
    )

  clean = render_all(())
  found = {"clean": both(clean)} | {name: both(render_all((name,))) for name in flaws.LOOKS}
  for factor in (1.5, 2, 3):
    found[f"saturation x {factor}"] = both(clean, lambda x, f=factor: oversaturate(x, f))
  return found


def write_agreement() -> None:
  """Writes the table of correlations with the simulated annotator."""
  found = correlate(AGREEMENT)
  lines = [
    f"{_made()}: correlations (Pearson's r) with the "
    f"annotator over {AGREEMENT} images of the corpus, seed {SEED}: with the penalties for "
    "looks, subtracted, and with the whole utility.",
    "",
    "| size | looks | utility |",
    "|---|---|---|",
    *(f"| {size} pixels | {looks:.3f} | {whole:.3f} |" for size, looks, whole in found),
  ]
  campaign.write_into(DOCUMENT, "\n".join(lines), "agreement")
  print("\n".join(lines))


def correlate(count: int) -> list[tuple[int, float, float]]:
  """Returns size, correlation with looks and with the utility, over `count` corpus images."""
  looks, utilities, scores = [], [], []
  for i in range(count):
    rng = np.random.default_rng([SEED, i])
    spec = prompts.draw_prompt(rng, "train")
    image, names = flaws.corpus_image(spec, rng)
    half = np.asarray(Image.fromarray(image).reduce(2))
    looks.append(-sum(annotator.PENALTIES.get(name, 0.0) for name in names))
    utilities.append(annotator.utility(names, spec))
    scores.append([verifier.visual_quality(of) for of in (image, half)])
  of_size = zip((64, 32), np.transpose(scores), strict=True)
  wanted = looks, utilities
  return [(size, *(float(np.corrcoef(x, of)[0, 1]) for x in wanted)) for size, of in of_size]


def _made() -> str:
  """Returns what made a table, and of which version of the scorer it is."""
  packages = ", ".join(f"{p} {metadata.version(p)}" for p in ("numpy", "scipy", "Pillow"))
  made = campaign.made_by("python benchmarks/quality_versions.py")
  return f"{made}, {packages}. Version {load_scorers([SCORER])[SCORER][0]} of {SCORER}"


def oversaturate(image: np.ndarray, factor: float) -> np.ndarray:
  """Scales the difference of each pixel from its grey; returns uint8, clipped."""
  return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def _score(file: Path, score) -> pd.DataFrame:
  """Returns old and new scores of a strip of images."""
  images = np.stack(np.split(np.asarray(Image.open(file)), methods.SHOWN, axis=1))
  base = file.stem == "base"
  method, _, seed = ("base", "", "0") if base else file.stem.rpartition("-")
  # The base's scores are in the records of all runs.
  scores = pd.read_parquet(file.with_name("sft-0.parquet" if base else f"{file.stem}.parquet"))
  old = scores[(scores.model == ("base" if base else "tuned")) & (scores.scorer == SCORER)]
  if set(old.version) != {FIRST}:
    sys.exit(f"{file} was not scored with version {FIRST} of {SCORER}")
  old = old.sort_values("seed").score.to_numpy()
  return pd.DataFrame(
    {
      "method": method,
      "seed": seed,
      "place": range(len(images)),
      "old": old[methods.shown_of(len(old))],
      "new": score(images, [""] * len(images)),
    }
  )


if __name__ == "__main__":
  main()
