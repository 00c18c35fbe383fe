"""Comparison of the versions of `shapes.quality` on the same images.

  python benchmarks/quality_versions.py

docs/shapes/records.parquet has images of each method from a campaign of benchmarks/methods.py
that was scored by version 1. The script scores them again and writes a table into
docs/shapes.md.
"""

import datetime
import sys
import tempfile
from pathlib import Path

import campaign
import methods
import numpy as np
import pandas as pd
import records
from PIL import Image

from jaxpref.scorers import load_scorers

RECORDS, DOCUMENT = Path("docs/shapes/records.parquet"), Path("docs/shapes.md")
SCORER, FIRST = "shapes.quality", "1"


def main() -> None:
  """Writes the table."""
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
  best = rows[rows.method == "sft"].set_index(["seed", "place"])
  lines = [
    f"Made by `python benchmarks/quality_versions.py` on {datetime.date.today()}: mean of "
    f"{SCORER} by version over the same images of a campaign of 2026-11-25 "
    f"([every method](methods.md)), {methods.SHOWN} test prompts by seed; +- is the standard "
    f"error over images. The last column is version {version}'s mean difference from SFT's "
    "image of the same prompt, noise and seed.",
    "",
    f"| method | n | version {FIRST} | version {version} | to SFT |",
    "|---|---|---|---|---|",
  ]
  for name, row in table.sort_values("new", ascending=False).iterrows():
    own = rows[rows.method == name].set_index(["seed", "place"])
    lost = (own.new - best.new).dropna() if name not in ("base", "sft") else []
    change = f"{lost.mean():+.3f} +- {lost.sem():.3f}" if len(lost) else ""
    lines.append(
      f"| {name} | {row.n:.0f} | {row.old:.3f} | {row.new:.3f} +- {row.error:.3f} | {change} |"
    )
  campaign.write_into(DOCUMENT, "\n".join(lines))
  print("\n".join(lines))


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
