"""The campaigns under benchmarks/, in small."""

import importlib.util
import json
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts there share campaign.py

import campaign  # noqa: E402


def _program(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_dro_against_sft(tiny_pipeline, tfds_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  base = shutil.copytree(tiny_pipeline, tmp_path / "base")
  program = _program("dro_vs_sft")
  arguments = [f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}", "--preset=tiny"]
  arguments += ["--seeds", "0", "1", "--set", f"model.path={base}", "train.num_updates=1"]
  program.main(arguments)
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert len(results["tuned"]["dro/shapes.quality"]) == 2
  assert "shapes.quality-1" in results["dro_against_sft"]
  table = (tmp_path / "out" / "dro_vs_sft.md").read_text()
  assert "seeds 0, 1" in table and "| shapes.quality |" in table
  # What is finished is not run again ...
  monkeypatch.setattr(campaign.main, "main", lambda _: pytest.fail("ran again"))
  program.main(arguments)
  assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
  # ... and runs on another base are not mistaken for these.
  (tmp_path / "runs" / "base.txt").write_text("another")
  with pytest.raises(SystemExit, match="tuned another base"):
    program.main(arguments)
