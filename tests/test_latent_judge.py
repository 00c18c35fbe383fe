"""Runs that train a latent reward model, and runs whose candidates it judges."""

import json
import shutil

import candidates_main
import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from jaxpref import config as config_lib
from jaxpref import export, main, sharding
from jaxpref.errors import UserError
from jaxpref.models import reward_model, save
from jaxpref.training import flops, load_run, programs, setup

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def surroundings(tfds_dir):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    yield


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory):
  """A run of 40 updates of a reward model, resumed after 20."""
  fields = {"optim.lr": 1e-3, "train.updates_per_iteration": 20, "train.batch_size": 16}
  whole, _ = runs.check_resumed(
    *(tiny_pipeline, tmp_path_factory.mktemp("judge"), "latent_reward"),
    updates=(20, 40),
    **fields,
  )
  return whole


def test_what_a_run_leaves(trained, tiny_pipeline):
  lines = runs.lines(trained)
  accuracy = [line["judge/accuracy"] for line in lines]
  assert np.mean(accuracy[-10:]) > np.mean(accuracy[:10])  # it learns
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert all(line["optim/grad_norm"] > 0 for line in lines)
  tested = json.loads((trained / "evaluation" / "40" / "accuracy.json").read_text())
  assert [of["level"] for of in tested] == [100, 300, 500, 700, 900]
  for of in tested:
    assert of["pairs"] >= 8 and 0 <= of["interval"][0] <= of["mean"] <= of["interval"][1] <= 1
  page = (trained / "report.html").read_text()
  assert "Accuracy by noise level" in page and "judge/accuracy" in page
  assert "held-out pairs with little noise" in page and "No scorer" not in page
  found = load_run.load_reward_model(str(trained))
  base = reward_model.abstract_params(found.pipeline, width=found.width)
  assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, base)
  ema = runs.parameters(trained)[1]
  np.testing.assert_array_equal(found.params["image"], ema["/ema/image"])


def test_it_is_no_model_of_images(trained, tiny_pipeline, tmp_path, capsys):
  with pytest.raises(UserError, match="has trained a latent reward model"):
    load_run.load(str(trained))
  assert export.main([f"--workdir={trained}", f"--out={tmp_path / 'x'}"]) == 2
  assert "give it as steps.judge" in capsys.readouterr().err
  for wrong in (str(tiny_pipeline), str(tmp_path), ""):
    with pytest.raises(UserError, match="is not the workdir of a reward model"):
      load_run.load_reward_model(wrong)


def test_candidates_resume_to_the_same_bits(trained, tiny_pipeline, tmp_path, capsys):
  judge = shutil.copytree(trained, tmp_path / "judge")
  fields = {"evaluate.num_prompts": 1, "optim.lr": 0.01, "train.updates_per_iteration": 1}
  fields["steps.judge"] = judge
  whole, _ = runs.check_resumed(tiny_pipeline, tmp_path, "lpo", updates=(19, 20), **fields)
  first, *_, last = runs.lines(whole)
  assert first["rewards/margin"] == pytest.approx(0.0, abs=1e-2)
  assert 0 < first["step_pairs/decided"] <= 1 and first["optim/grad_norm"] > 0
  assert last["err/policy_w"] != last["err/reference_w"]
  # Another reward model would end with other bits.
  shutil.rmtree(judge / "checkpoints" / "40")
  fields["train.num_updates"] = 3
  assert main.main(runs.arguments(tiny_pipeline, whole, "lpo", **fields)) == 2
  assert "reward model in steps.judge" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("lpo", {}, "steps.judge"),
    ("lpo", {"steps.judge": "runs/missing"}, "is not the workdir of a reward model"),
    ("ppo", {"steps.judge": "runs/x"}, "set steps.candidates to 2 or more"),
    ("latent_reward", {"lora.rank": 2}, "lora.rank and model.start do not apply"),
    ("latent_reward", {"judge.held_out": 100_000}, "judge.held_out = 100000 leaves"),
    ("latent_reward", {"loss.name": "sft"}, "the section judge do not fit"),
    ("latent_reward", {"loss.space": "eps"}, "has no errors"),
  ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, message, tiny_pipeline):
  config = config_lib.load_config(f"{method}:tiny")
  config.model.path = str(tiny_pipeline)
  for name, value in changes.items():
    section, field = name.split(".")
    with config.unlocked():
      config[section][field] = value
  with pytest.raises(UserError) as error:
    setup.prepare(config)
  assert message in str(error.value)


def test_a_judge_of_another_vae_is_refused(trained, tiny_pipeline, tmp_path):
  base = shutil.copytree(tiny_pipeline, tmp_path / "other")
  weights = base / "vae" / "diffusion_pytorch_model.safetensors"
  tensors = load_file(weights)
  name = min(tensors)
  save.save_tensors(weights, tensors | {name: tensors[name] + 1})
  config = config_lib.load_config("lpo:tiny")
  config.model.path, config.steps.judge = str(base), str(trained)
  with pytest.raises(UserError, match="was trained with another vae"):
    setup.check(config)


def test_flops_of_an_update(tiny_pipeline, trained):
  config = config_lib.load_config("latent_reward:tiny")
  config.model.path = str(tiny_pipeline)
  checked = setup.check(config, mesh=sharding.make_mesh())
  work = flops.of_update(checked, flops.of_forward(checked.pipeline))
  program, arguments = programs.abstract_programs(checked)
  traced = flops.count(jax.make_jaxpr(program.train_step)(*arguments))
  assert traced == pytest.approx(sum(work.values()), rel=0.02)
  config = config_lib.load_config("lpo:tiny")
  config.model.path, config.steps.judge = str(tiny_pipeline), str(trained)
  checked = setup.check(config)
  forward = flops.of_forward(checked.pipeline)
  work = flops.of_update(checked, forward)
  reward = checked.judge.reward
  one = flops.of_reward(reward.pipeline, width=reward.width, guidance=reward.guidance)
  steps, images = config.rollout.num_steps, config.rounds.num_prompts
  assert work["judge"] == 2 * images * (steps - config.steps.first) * one
  assert work["rollout"] == images * steps * forward
  traced = candidates_main.sampled_flops(checked)
  assert traced == pytest.approx(work["rollout"] + work["judge"], rel=0.02)
  # Compared after two steps and after the third one, with one prediction more in between.
  config.steps.apart, config.steps.gap_noisy = 2, 0.0
  apart = flops.of_update(setup.check(config), forward)
  assert apart["judge"] == 2 * images * 2 * one
  assert apart["rollout"] == images * (steps + 1) * forward
  assert 0.4 * forward < one < 1.2 * forward  # half of the network, with and without the prompt


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_presets_train_models_of_reduced_width(preset, tmp_path, capsys):
  base = families.write_pipeline(preset, tmp_path, shallow=True)
  small = {
    "model.path": base,
    "model.image_size": 0,
    "data.source": "shapes",
    "data.num_rows": 20,
    "judge.held_out": 4,
    "judge.width": 16,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "train.num_updates": 1,
  }
  workdir = tmp_path / "run"
  assert len(runs.train_published(f"latent_reward:{preset}", workdir, small, capsys)) == 1
  if preset == "sdxl":
    return
  small |= {"steps.judge": workdir, "rounds.num_prompts": 2, "rounds.updates": 1}
  small |= {"train.batch_size": 4, "rollout.num_steps": 2, "lora.rank": 2}
  small |= {"data.num_experts": 2, "data.num_rows": 0, "steps.gap": 0, "steps.gap_noisy": 0}
  small |= {"evaluate.num_steps": 2, "evaluate.images_per_prompt": 1, "evaluate.num_prompts": 2}
  small |= {"rounds.scorers": "('toy_scorers.red',)", "alarms.every": 0}
  small = {name: of for name, of in small.items() if not name.startswith("judge.")}
  logged = runs.train_published(f"lpo:{preset}", tmp_path / "lpo", small, capsys)
  assert len(logged) == 1
