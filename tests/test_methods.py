"""Every method from its configuration: twenty updates on the embedded world, and presets."""

import json

import jax
import numpy as np
import pytest
import runs
from conftest import ROOT
from orbax.checkpoint import v1 as ocp

from jaxpref import base_config, losses, main
from jaxpref import config as config_lib
from jaxpref.data import rows as rows_lib
from jaxpref.errors import UserError
from jaxpref.training import setup

METHODS = (
  *("csft", "dpo", "dro", "dspo", "improver", "kto", "listwise", "mapo", "sdpo", "sft"),
  *("simpo", "awm", "best_of", "dgpo", "nft", "online_dpo", "rwr", "ppo", "prdp"),
  *("d3po", "spo"),
  *("draft", "draft_lv", "alignprop", "refl"),
)
PATHWISE = ("draft", "draft_lv", "alignprop", "refl")  # whose updates sample
ROUNDS = ("awm", "best_of", "dgpo", "online_dpo", "rwr", "ppo", "d3po")  # others: see RESUMED
ITERATIVE = ("iterative_dpo", "spin")  # see test_iterate
LATENT = ("latent_reward", "lpo", "step_reward")  # see test_latent_judge and test_step_judge
# What further options there are, run by one method each.
OPTIONS = {
  "kto": {"data.noise_draws": 2},
  "dro": {"rollout.states": 2},
  "sft": {"optim.schedule": "linear"},
  **{name: {"alarms.every": 0} for name in ("draft", "draft_lv", *ROUNDS)},
  "refl": {"alarms.every": 10},
}


# Their whole runs are in test_pathwise_step and test_rounds.
RESUMED = ("alignprop", "nft", "prdp", "spo")
# What the train step provides to these, a method without the mark gets too, or a test of its
# own has it: test_improver and test_steps.
_ALIKE = (
  *("csft", "dpo", "dspo", "improver", "kto", "listwise", "mapo", "sdpo", "sft"),
  *("simpo", "awm", "best_of", "dgpo", "online_dpo", "rwr", "draft", "draft_lv", "refl"),
  *("d3po", "ppo"),
)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.long] * (name in _ALIKE))
    for name in METHODS
    if name not in RESUMED
  ],
)
def test_twenty_updates(name, tiny_pipeline, tfds_dir, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  fields = {
    "model.path": tiny_pipeline,
    "train.num_updates": 20,
    "train.updates_per_iteration": 20,
    "optim.lr": 1e-4,
    "evaluate.num_prompts": 1,
    **OPTIONS.get(name, {}),
  }
  flags = [f"--config.{field}={value}" for field, value in fields.items()]
  workdir = tmp_path / "run"
  arguments = [f"--config=configs/{name}.py:tiny", f"--workdir={workdir}", *flags]
  assert main.main(arguments) == 0, capsys.readouterr().err
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 21))
  assert all(np.isfinite(line["loss"]) for line in lines)
  runs.check_glossary(lines)
  config = config_lib.load_config(f"{name}:tiny")
  needs = losses.make_loss(config.loss).needs
  arms = needs.arms or rows_lib.arms_of(needs.rows, setup.list_size(config))
  arms += ("p",) if needs.rollout else ()
  for arm in arms:
    errors = [line[f"err/policy_{arm}"] for line in lines]
    if arm == "p":
      assert errors == [0.0] * 20  # its own prediction is the target
      continue
    assert len(set(errors)) == 20
    if needs.reference:
      # At the start policy and reference are one.
      assert errors[0] == pytest.approx(lines[0][f"err/reference_{arm}"], rel=1e-5)
      assert errors[-1] != lines[-1][f"err/reference_{arm}"]
  assert sum(line["optim/grad_norm"] > 0 for line in lines) >= 15
  falls = name == "sft"  # its schedule is linear, others' constant
  rates = [1e-4 * (1 - falls * done / 20) for done in range(20)]
  np.testing.assert_allclose([line["optim/lr"] for line in lines], rates, rtol=1e-4)
  assert "optim/lr" in (workdir / "report.html").read_text()
  assert (workdir / "report.html").exists()


@pytest.mark.long
def test_other_ways_to_compute(tiny_pipeline, tfds_dir, tmp_path, monkeypatch, capsys):
  """Additions that roll out with guidance, from a copy that lags, in bfloat16."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  fields = {
    "model.path": tiny_pipeline,
    "model.dtype": "bfloat16",
    "model.frozen_dtype": "bfloat16",
    "data.flip": True,
    "lora.rank": 2,
    "rollout.solver": "ddim",
    "rollout.guidance": 3.0,
    "rollout.refresh_every": 2,
    "optim.lr": 0.01,
    "optim.schedule": "cosine",
    "train.accumulate": 2,
  }
  flags = [f"--config.{field}={value}" for field, value in fields.items()]
  arguments = ["--config=configs/dro.py:tiny", f"--workdir={tmp_path / 'run'}", *flags]
  assert main.main(arguments) == 0, capsys.readouterr().err
  lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  apart = [abs(x["err/policy_e"] - x["err/reference_e"]) for x in lines]
  assert apart[0] < 1e-6 < min(apart[1:])
  saved = ocp.checkpointables_metadata(tmp_path / "run/checkpoints/4").metadata["state"]
  assert len(jax.tree.leaves(saved["policy_copy"])) == len(jax.tree.leaves(saved["params"]))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(saved["params"]))


@pytest.mark.parametrize("name", (*METHODS, *ITERATIVE, *LATENT))
@pytest.mark.parametrize("preset", base_config.PRESETS)
def test_presets_are_sound(name, preset):
  if name in ("improver", *PATHWISE, *LATENT) and preset in base_config.FLOWS:
    with pytest.raises(UserError, match=f"has no preset '{preset}'"):
      config_lib.load_config(f"{name}:{preset}")
    return
  config = config_lib.load_config(f"{name}:{preset}")
  config_lib.validate(config)
  assert config.name == name
  other = {"iterative_dpo": "dpo", "online_dpo": "dpo", "best_of": "sft"}
  other |= dict.fromkeys(PATHWISE, "reward")
  other |= dict.fromkeys(("d3po", "lpo", "spo"), "step_pairs")
  other["step_reward"] = "latent_reward"
  assert config.loss.name == other.get(name, name)
  losses.make_loss(config.loss)
  assert config.train.batch_size % config.train.accumulate == 0


@pytest.mark.parametrize(
  ("name", "extra", "message"),
  [
    (
      "dpo",
      ["--config.loss.variant=square"],
      "loss.variant must be one of sigmoid",
    ),
    ("dpo", ["--config.loss.beta=-1"], "'loss.beta' must be positive"),
    ("dpo", ["--config.rollout.replay=2"], "are for losses that take states"),
    ("dro", ["--config.data.noise_draws=2"], "rollouts sample them at each update"),
    ("dro", ["--config.rollout.states=5"], "rollout.num_steps = 2 states"),
    ("dspo", ["--config.data.noise_draws=2"], "this loss needs predictions"),
    ("listwise", ["--config.data.source=folder"], "folder has no lists"),
    ("dpo", ["--config.data.good_prefix=+ "], "are for losses that learn singles"),
    (
      "sft",
      ["--config.data.num_rows=5"],
      "set data.num_experts, and data.num_rows = 0 in its config file (got data.num_rows = 5)",
    ),
    (
      "dpo",
      ["--config.data.noise_draws=2", "--config.model.dtype=bfloat16"],
      "needs model.dtype=float32",
    ),
    ("kto", ["--config.loss.weight_desirable=-1"], "'loss.weight_desirable' must be"),
    ("dpo", ["--config.loss.name=.x"], "unknown loss '.x'"),
    ("dpo", ["--config.loss.name=contract"], "unknown loss 'contract'"),
    ("dpo", ["--config.lora.rank=2", "--config.lora.targets=none"], "does not match a layer"),
    ("dpo", ["--config.loss.name=kto"], "loss 'kto' does not take loss.variant"),
    ("listwise", ["--config.data.source=pickapic"], "pickapic has no lists"),
    ("dpo", ["--config.data.source=online"], "has no generated pairs"),
    ("dpo", ["--config.model.start=/nowhere"], "/nowhere is neither a directory nor a Hub id"),
    ("dpo", ["--config.model.start=shapes"], "the parameters of shapes do not fit"),
    ("improver", ["--config.lora.rank=2"], "leaves out the input's new weights"),
    ("improver", ["--config.data.noise_draws=2"], "is for losses that take images as"),
    (
      "improver",
      [
        f"--config.loss.weight_{task}=0"
        for task in ("winning", "reconstruction", "unconditional")
      ],
      "loss.weight_winning, loss.weight_reconstruction and loss.weight_unconditional are all 0",
    ),
    (
      "spin",
      ["--config.loss.name=listwise"],
      "iterations generate pairs, but loss 'listwise' learns",
    ),
    ("spin", ["--config.evaluate.scorers=('shapes.x',)"], "shapes.x"),
    ("spin", ["--config.iterate.num_steps=2000"], "iterate.num_steps: sampling steps must"),
    (
      "spin",
      ["--config.data.num_rows=99"],
      "data.num_rows = 99 must be at most iterate.num_pairs = 12",
    ),
    ("improver", ["--config.improve.num_steps=2000"], "improve.num_steps: sampling steps"),
    ("spin", ["--config.iterate.winners=best"], "'iterate.winners' must be one of"),
    ("spin", ["--config.iterate.winners=improved"], "iterate.improver is empty"),
    ("iterative_dpo", ["--config.iterate.improver=shapes"], "shapes is not an improver"),
  ],
)
def test_what_cannot_be_is_one_line(
  name, extra, message, tiny_pipeline, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(ROOT)
  flags = [f"--config.model.path={tiny_pipeline}", f"--workdir={tmp_path / 'run'}"]
  assert main.main([f"--config=configs/{name}.py:tiny", *flags, *extra]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", (*METHODS, *ITERATIVE))
def test_help_explains_every_field(name, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as done:
    main.main([f"--config=configs/{name}.py", "--help"])
  assert done.value.code == 0
  lines = {
    line.split("=")[0].removeprefix("  --config."): line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith("  --config.")
  }
  config = config_lib.load_config(name)
  for field, value in config_lib.leaves(config):
    meaning = lines[field].removeprefix(f"  --config.{field}={value}").strip()
    assert meaning, f"{field} is not explained"
