"""The timing scripts in small, and that PyTorch's part does the same work."""

import json
import sys

import conftest
import numpy as np
import pytest
from conftest import live

from jaxpref import config as config_lib

sys.path.insert(0, str(conftest.ROOT / "benchmarks"))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)


@pytest.mark.long
@live
def test_the_fast_rival_draws_what_the_slow_one_does():
  """Both solvers are DPM-Solver++ (2M), each sample at timesteps of its own."""
  import rivals
  import torch

  config = {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "sample_size": 4,
    "in_channels": 4,
  }
  drawn = []
  for kind in ("P0", "P1"):
    rival = rivals.Rival(config, kind, rows=6, dtype="float32", tokens=3)
    torch.manual_seed(1)
    draw = rival._draw_fast if rival.fast else rival._draw_slowly
    drawn.append([part.detach().numpy() for part in draw(10)])
    before = [p.clone() for p in rival.unet.parameters()]
    rival.dro(4)
    rival.sft()
    assert any((a != b).any() for a, b in zip(before, rival.unet.parameters(), strict=True))
    rival.sample(2, 5.0)
  (slow, slow_target, slow_t), (fast, fast_target, fast_t) = drawn
  np.testing.assert_array_equal(slow_t, fast_t)
  assert len(set(slow_t)) > 3
  np.testing.assert_allclose(slow, fast, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(slow_target, fast_target, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_scripts_in_small(tiny_pipeline, tmp_path, capsys, monkeypatch):
  import attention
  import dro_loop
  import levers
  import loops
  import method_times

  out = tmp_path / "dro.json"
  options = ["--config=configs/dro.py:tiny", f"--model={tiny_pipeline}", "--rows=16"]
  dro_loop.main([*options, "--lots=4", "--turns=1", f"--out={out}"])
  numbers = json.loads(out.read_text())
  assert numbers["contenders"].keys() == {"ours", "ours, all rows at once"}
  assert numbers["contenders"]["ours"]["time / ours"] == 1.0
  work = numbers["flops of a call"]
  assert 0 < work["ours"] < work["ours, all rows at once"]
  times = tmp_path / "times.json"
  options = ["--preset=tiny", f"--model={tiny_pipeline}", "--rows=4", "--turns=1"]
  method_times.main([*options, "--methods", "dspo", f"--out={times}"])
  numbers = json.loads(times.read_text())
  assert numbers["time / SFT's"].keys() == {"sft", "dspo"}
  # Pairs of two, whose reference is a third of a policy's work beside it.
  assert numbers["FLOPs / SFT's"]["dspo"] == pytest.approx(4 / 3)
  known = {"known errors": ("data.noise_draws=4",)}
  monkeypatch.setattr(levers, "LEVERS", {"dpo": known})
  levers.main([*options, f"--out={tmp_path / 'levers.json'}"])
  numbers = json.loads((tmp_path / "levers.json").read_text())
  # Of a policy's two passes and a reference's one, the last is left out.
  assert numbers["dpo, known errors"]["FLOPs / as configured"] == pytest.approx(3 / 4)
  loops.main(["--rows=2", "--channels=4", "--turns=1", f"--out={tmp_path / 'loops.json'}"])
  found = json.loads((tmp_path / "loops.json").read_text())["ratios"]
  assert all(of["straight"] == 1.0 and of.keys() >= {"loop"} for of in found.values())
  attention.main(["--shapes=1x16x2x8", "--turns=1", f"--out={tmp_path / 'attention.json'}"])
  assert "| DRO | pairs a second |" in capsys.readouterr().out


def test_costs_of_rewards_by_hand(tmp_path, capsys):
  """Of a round on the shapes world: guided sampling, then AWM's four kinds of passes."""
  import reward_costs

  reward_costs.main([f"--out={tmp_path / 'rewards'}", "--configs", "awm:shapes", "sft:shapes"])
  found = json.loads((tmp_path / "rewards" / "costs.json").read_text())
  awm, config = found["awm:shapes"], config_lib.load_config("awm:shapes")
  assert awm["images"] == config.train.batch_size == 64
  forward = awm["policy"] / (3 * 64)
  assert awm["reference"] == awm["old"] == 64 * forward
  evaluations = config.rollout.num_steps * (1 + (config.rollout.guidance > 1))
  assert awm["rollout"] == 64 * evaluations * forward
  assert found["sft:shapes"]["policy"] == 3 * found["sft:shapes"]["images"] * forward
  assert "| `awm:shapes` | 64 | " in (tmp_path / "rewards.md").read_text()
  assert "| `awm:shapes` | 64 | " in capsys.readouterr().out
