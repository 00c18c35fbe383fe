"""Presets of online training for published models, on such models of reduced width."""

import json

import families
import numpy as np
import pytest

from jaxpref import main
from jaxpref.shapes import prompts


@pytest.mark.long
@pytest.mark.parametrize(("method", "preset"), [("awm", "sd15"), ("dgpo", "sdxl")])
def test_presets_train_models_of_reduced_width(method, preset, tmp_path, capsys):
  base = families.write_pipeline(preset, tmp_path, shallow=True)
  (tmp_path / "prompts.txt").write_text("\n".join(prompts.held_out(2)) + "\n")
  small = {
    "model.path": base,
    "lora.rank": 2,
    "data.source": "prompts",
    "data.path": tmp_path / "prompts.txt",
    "data.num_experts": 2,
    "rounds.num_prompts": 2,
    "rounds.images_per_prompt": 2,
    "rounds.scorers": "('toy_scorers.red',)",
    "rollout.num_steps": 2,
    "train.batch_size": 4 if method == "awm" else 2,
    "train.accumulate": 1,
    "train.num_updates": 1,
    "evaluate.num_steps": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_prompts": 2,
  }
  flags = [f"--config.{name}={value}" for name, value in small.items()]
  workdir = tmp_path / "run"
  arguments = [f"--config={method}:{preset}", f"--workdir={workdir}", *flags]
  assert main.main(arguments) == 0, capsys.readouterr().err
  (line,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  assert np.isfinite(line["loss"]) and line["optim/grad_norm"] > 0
  assert line["reward/mean"] == line["reward/toy_scorers.red"] > 0
