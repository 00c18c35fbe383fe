"""Presets of online training for published models, on such models of reduced width."""

import families
import flow_networks
import pytest
import runs

from jaxpref import config as config_lib
from jaxpref import losses
from jaxpref.shapes import prompts


def _write(preset, directory):
  if preset.startswith("sd35m"):
    return flow_networks.write_sd3(directory / "model", t5=False)
  return families.write_pipeline(preset.partition("_")[0], directory, shallow=True)


# Four images of a round, for every kind of rows; of `ppo`, some or all of four steps, and of
# `spo` two steps with candidates. A pair of steps of SD 1.5 is in test_latent_judge.
CASES = [
  (
    "spo",
    "sdxl",
    {
      "train.batch_size": 8,
      "rounds.updates": 1,
      "steps.first": 0,
      "steps.apart": 2,
      "steps.gap": 0.0,
    },
  ),
  ("ppo", "sd35m_mix", {"train.batch_size": 8, "rounds.updates": 1, "steps.window": 2}),
  ("ppo", "sd15_dpok", {"train.batch_size": 8, "rounds.updates": 1, "steps.trained": 2}),
  ("ppo", "sd35m_fast", {"train.batch_size": 8, "rounds.updates": 1, "steps.window": 2}),
  ("ppo", "sd35m_dance", {"train.batch_size": 8, "rounds.updates": 1, "steps.trained": 2}),
  ("d3po", "sd35m", {"train.batch_size": 4, "rounds.updates": 1}),
  ("prdp", "sd15", {"train.batch_size": 2, "rounds.updates": 1}),
  ("awm", "sd15", {"train.batch_size": 4}),
  ("nft", "sd35m", {"train.batch_size": 4}),
  ("dgpo", "sdxl", {"train.batch_size": 2}),
  ("rwr", "sd15", {"train.batch_size": 4, "rounds.updates": 1}),
  ("best_of", "sd15", {"train.batch_size": 2, "rounds.updates": 1}),
  ("online_dpo", "sd35m", {"train.batch_size": 2}),
  (
    "refl",
    "sdxl",
    {
      "loss.target": 1000.0,  # above the toy scores
      "pathwise.first": 1,
      "pathwise.end": 2,
      "pathwise.last": 2,
      "pathwise.mean": 0,
    },
  ),
  ("draft", "sd15", {"pathwise.last": 2}),
  ("draft_lv", "sd15", {}),
  ("alignprop", "sd15", {"pathwise.last": 2, "pathwise.mean": 1.5, "pathwise.std": 1.0}),
]
PATHWISE = ("refl", "draft", "draft_lv", "alignprop")


@pytest.mark.long
@pytest.mark.parametrize(("method", "preset", "more"), CASES)
def test_presets_train_models_of_reduced_width(method, preset, more, tmp_path, capsys):
  base = _write(preset, tmp_path)
  (tmp_path / "prompts.txt").write_text("\n".join(prompts.held_out(2)) + "\n")
  small = {
    "model.path": base,
    "model.image_size": 0,
    "lora.rank": 2,
    "data.source": "prompts",
    "data.path": tmp_path / "prompts.txt",
    "data.num_experts": 2,
    "rollout.num_steps": 4 if method == "ppo" else 2,
    "train.accumulate": 1,
    "train.num_updates": 1,
    "evaluate.num_steps": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_prompts": 2,
    **more,
  }
  if method in PATHWISE:
    small |= {"pathwise.scorers": "('toy_scorers.red',)", "alarms.every": 1}
    small["train.batch_size"] = 2
  else:
    small |= {"rounds.num_prompts": 2, "rounds.images_per_prompt": 2}
    small |= {"rounds.scorers": "('toy_scorers.red',)"}
  *_, line = runs.train_published(f"{method}:{preset}", tmp_path / "run", small, capsys)
  assert line["reward/mean"] == line["reward/toy_scorers.red"] > 0
  assert "rounds.scorers" in small or line["alarm/kl"] > 0


# Further constants from the authors' code, by method and preset.
PUBLISHED = {
  "ppo:sd15": {"optim.lr": 3e-4, "rollout.guidance": 5.0, "rollout.num_steps": 50},
  "ppo:sd15_dpok": {"optim.lr": 1e-5, "optim.clip_norm": 1e-3, "rollout.guidance": 7.5},
  "ppo:sd15_dance": {"optim.lr": 1e-5, "rounds.ddof": 1, "rounds.eps": 1e-8},
  "ppo:sd35m": {"steps.eta": 0.7, "rollout.num_steps": 10, "rounds.images_per_prompt": 24},
  "ppo:sd35m_fast": {"steps.eta": 0.8, "steps.window": 3, "rollout.guidance": 1.0},
  "ppo:flux_dance": {"steps.eta": 0.3, "steps.trained": 9, "rollout.num_steps": 16},
  "ppo:flux_mix": {"steps.eta": 0.7, "steps.hold": 25, "rollout.num_steps": 25},
  "awm:sd35m": {"rollout.num_steps": 14, "rollout.guidance": 1.0, "rounds.old_decay": 0.3},
  "nft:sd35m": {"rollout.num_steps": 10, "rounds.num_prompts": 48, "rounds.old_decay": 0.5},
  "dgpo:sd35m": {"loss.beta": 10.0, "loss.clip": 0.05, "rollout.num_steps": 10},
  "d3po:sd15": {"loss.beta": 0.1, "loss.clip": 0.1, "rollout.num_steps": 20},
  "spo:sd15": {"loss.beta": 10.0, "steps.candidates": 4, "rollout.guidance": 5.0},
  "rwr:sd15": {"rounds.num_prompts": 10_240, "rounds.images_per_prompt": 1},
  "alignprop:sd15": {"loss.scale": 1e-4, "rollout.guidance": 5.0, "rollout.num_steps": 50},
  "refl:sd15": {"loss.scale": 1e-3, "rollout.guidance": 1.0, "rollout.num_steps": 40},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_further_published_constants(name):
  fields = dict(config_lib.leaves(config_lib.load_config(name)))
  assert {field: fields[field] for field in PUBLISHED[name]} == pytest.approx(PUBLISHED[name])


# Ratio's clip, largest advantage, whose deviation, tie to the base; from the authors' code.
CONSTANTS = {
  "sd15": (1e-4, 5.0, "group", 0.0),
  "sd15_dpok": (1e-4, 0.0, "none", 0.01 / 100),
  "sd15_dance": (1e-4, 5.0, "group", 0.0),
  "sd35m": (1e-4, 5.0, "global", 0.01),
  "sd35m_fast": (1e-5, 5.0, "global", 0.0),
  "sd35m_dance": (1e-4, 5.0, "group", 0.0),
  "sd35m_mix": (1e-4, 5.0, "group", 0.0),
  "flux_dance": (1e-4, 5.0, "group", 0.0),
  "flux_mix": (1e-4, 5.0, "group", 0.0),
}


@pytest.mark.parametrize("preset", CONSTANTS)
def test_published_constants_of_policy_gradients(preset):
  config = config_lib.load_config(f"ppo:{preset}")
  config_lib.validate(config)
  loss, rounds, train = config.loss, config.rounds, config.train
  found = (loss.clip, rounds.clip, rounds.scale, loss.weight_reference)
  assert found == pytest.approx(CONSTANTS[preset])
  images = rounds.num_prompts * rounds.images_per_prompt
  steps = rounds.updates * train.batch_size / images
  usual = {"sd15": 50, "sd35m": 9}.get(preset)
  assert steps == (config.steps.trained or config.steps.window or usual)
  assert train.num_updates % rounds.updates == train.batch_size % train.accumulate == 0
  assert losses.make_loss(loss, updates=rounds.updates).needs.old
