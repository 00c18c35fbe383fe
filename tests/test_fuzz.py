"""Damaged input of every reader, a few of what `benchmarks/fuzz.py` tries by the thousand."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz_runner  # noqa: E402
import fuzz_targets  # noqa: E402

TARGETS = {target.name: target for target in fuzz_targets.targets()}
_SLOW = 4  # of a pipeline, a checkpoint: tenths of a second each
_INPUTS = 10


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_read_as_it_was_or_refused_in_a_line(
  name, tiny_pipeline, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  target = TARGETS[name]
  prepared = fuzz_runner.Prepared(target, tmp_path, tiny_pipeline)
  count = _SLOW if target.weight < 4 else _INPUTS
  outcomes = {number: prepared.run(0, number) for number in range(count)}
  bad = {n: o for n, o in outcomes.items() if o.kind in ("traceback", "hang", "silent")}
  assert not bad


def test_inputs_depend_on_their_seed_and_number_alone(tiny_pipeline, tmp_path):
  target = TARGETS["image, PNG"]
  one, two = (
    fuzz_runner.Prepared(target, tmp_path / name, tiny_pipeline) for name in ("one", "two")
  )
  assert one.damaged(0, 3) == two.damaged(0, 3) != one.damaged(1, 3)


def test_what_a_damaged_file_is_read_as_is_compared(tiny_pipeline, tmp_path):
  target = TARGETS["image, PNG"]
  prepared = fuzz_runner.Prepared(target, tmp_path, tiny_pipeline)
  other = fuzz_runner.Prepared(TARGETS["image, BMP"], tmp_path / "other", tiny_pipeline)
  prepared.files = other.files
  assert "silent" in {prepared.run(0, number).kind for number in range(20)}
