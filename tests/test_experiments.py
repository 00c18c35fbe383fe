"""The papers' experiments, rehearsed: every step, in miniature."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, WITHOUT_TORCH

sys.path.append(str(ROOT / "experiments"))
import reproduce_dro
import reproduce_improver
import steps


def _start(name, *flags, **env):
  return subprocess.run(
    [sys.executable, f"experiments/{name}.py", *flags],
    cwd=ROOT,
    env=os.environ | WITHOUT_TORCH | env,
    capture_output=True,
    text=True,
    check=False,
  )


def _run(name, *flags):
  done = _start(name, *flags)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


@pytest.mark.long
def test_the_paper_on_dro_is_rehearsed(tmp_path):
  """Build, score, seven runs, the comparison, the table; started again, nothing is repeated."""
  out = _run("reproduce_dro", "--rehearse", f"--out={tmp_path}")
  table = (tmp_path / "table.md").read_text()
  for name in ("base", *reproduce_dro.RUNS):
    assert f"| {name} | " in table
  assert table.count("(21.52)") == 1 and "numbers mean nothing" in table
  assert "--config.model.start" in out and "[10/10] compare" in out
  page = (tmp_path / "comparison" / "report.html").read_text()
  assert "had a part in the training: no evidence" in page and 'alt="kto-sft: ' in page
  again = _run("reproduce_dro", "--rehearse", f"--out={tmp_path}")
  assert again.count("finished before") == 8 and "is built already" in again
  assert (tmp_path / "table.md").read_text() == table


@pytest.mark.long
def test_the_paper_on_improvers_is_rehearsed(tmp_path):
  """SPIN, the improver, iterative DPO from both, three comparisons, and their tables."""
  out = _run("reproduce_improver", "--rehearse", f"--out={tmp_path}")
  assert "[9/9] diversity" in out
  table = (tmp_path / "table.md").read_text()
  assert table.count("| iterative-38400 | ") == 3 and table.count("(21.46)") == 2
  again = _run("reproduce_improver", "--rehearse", f"--out={tmp_path}")
  assert again.count("finished before") == 8 and (tmp_path / "table.md").read_text() == table
  # The last iterations start from SPIN's last, and the reference is the base.
  (start,) = json.loads((tmp_path / "runs/iterative-2560/iterations/1/starts.json").read_text())
  assert start["reference"] == "base"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--plan=xyz"], "'xyz' is not one of v4"),
    (["--data=x", "--test=y.parquet"], "--model is missing"),
    # Found before days of training.
    (
      ["--data=x", "--test=y.parquet", "--model=z"],
      "pickscore.v1/model.safetensors is missing",
    ),
  ],
)
def test_what_cannot_be_is_one_line(flags, message, tmp_path):
  flags = [*flags, f"--out={tmp_path / 'out'}"]
  scorers = {"JAXPREF_SCORERS": str(tmp_path), "HF_HUB_OFFLINE": "1"}
  done = _start("reproduce_improver", *flags, **scorers)
  assert done.returncode == 2 and message in done.stderr
  assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_tables_stand_beside_the_published_numbers():
  """In the paper's units, both ways round, and without a number that does not exist."""
  entry = {"win_rate": 0.6, "interval": [0.5, 0.7], "holm": None, "p_value": 0.04}
  key = "pickscore.v1-1"
  results = {
    "scorers": {key: {}},
    "models": {n: {key: {"mean": 21.0, "std_prompts": 1.0}} for n in ("base", "dpo", "dro")},
    "comparisons": [
      {"baseline": "base", "model": "dro", "scorers": {key: entry}},
      {"baseline": "dro", "model": "dpo", "scorers": {key: entry}},
    ],
  }
  text = reproduce_dro.tables(results, {"PickScore": "pickscore.v1"})
  assert "| base | 21.000 ± 1.000 (20.68) |" in text
  assert "| dpo | 21.000 ± 1.000 (-) |" in text
  assert "| base | 60.0 % (50.0 to 70.0), p 0.04 |" in text
  assert "| dpo | 40.0 % (30.0 to 50.0), p 0.04 |" in text


def test_tables_of_the_improver():
  """Scores on training prompts, then on test prompts; the diversity of every model."""
  score = lambda mean: {"pickscore.v1-1": {"mean": mean, "std_prompts": 1.0}}  # noqa: E731
  seen = {"models": {name: score(20.0 + i) for i, name in enumerate(reproduce_improver.MODELS)}}
  test = {"models": {name: score(10.0 + i) for i, name in enumerate(reproduce_improver.MODELS)}}
  vendi = {
    name: {"vendi.pixels-1": {"mean": float(i)}}
    for i, name in enumerate(reproduce_improver.MODELS)
  }
  text = reproduce_improver.tables(seen, test, {"diversity": {"by_prompt": {"models": vendi}}})
  assert "| base | 20.000 ± 1.000 (-) | 10.000 ± 1.000 (-) |" in text
  assert "| spin | 21.000 ± 1.000 (21.15) | 11.000 ± 1.000 (21.41) |" in text
  assert (
    text.count("| iterative-38400 | 25.000 ± 1.000 (21.20) | 15.000 ± 1.000 (21.46) |") == 2
  )
  assert "| improver | 2.00 |" in text


def test_evaluations_of_a_comparison_are_counted():
  """Two a step for a model with guidance, three for an improver."""
  arguments = ["--models=a=A,b=B,c=C", "--improve=c:a", "--prompts=p", "--out=o", "--steps=50"]
  count = steps._evaluations_of_comparison
  assert count([*arguments, "--images-per-prompt=4"], 500) == 500 * 4 * 50 * (2 + 2 + 3)
  assert count([*arguments, "--images-per-prompt=64", "--num-prompts=10"], 500) == 640 * 350
