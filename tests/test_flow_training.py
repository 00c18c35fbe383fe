"""Training with flow matching: noised rows, rollouts, every loss, whole runs, pretraining."""

import json
import shutil

import devices_main
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import ROOT, live

from jaxpref import export, losses, main, rng, sharding
from jaxpref.data import encode
from jaxpref.diffusion import flow, levels
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedules
from jaxpref.evaluation import sampling
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.pretrain import run as pretrain
from jaxpref.training import batch as batch_lib
from jaxpref.training import rollout as rollout_lib
from jaxpref.training import train_step

FLOW = flow.FlowSchedule(shift=3.0, density=flow.Density("logit_normal"))
SCHEDULER = {
  "_class_name": "FlowMatchEulerDiscreteScheduler",
  "num_train_timesteps": 1000,
  "shift": 3.0,
  "use_dynamic_shifting": False,
}


def _noised(needs, schedule=FLOW, rollout=None, **options):
  _, rows, empty = devices_main.initial(needs.rows)
  arms = batch_lib.make_arms(
    *(schedule, needs, rows | options, rollout, empty), seed=3, update=5, prompt_dropout=0.0
  )
  return rows, arms


def test_rows_are_noised_by_the_equation():
  needs = losses.load_loss("dpo").NEEDS
  rows, arms = _noised(needs)
  sigma = np.asarray(arms.t, np.float64)[:, None, None, None, None]
  assert arms.t.dtype == jnp.float32 and len(set(arms.t.tolist())) == devices_main.ROWS
  eps = np.asarray(arms.target) + rows["latents"]
  np.testing.assert_allclose(eps[:, 0], eps[:, 1], atol=1e-5)  # both arms' noise
  x_t = (1 - sigma) * rows["latents"] + sigma * eps
  np.testing.assert_allclose(arms.x_t, x_t, atol=1e-5)
  key = jax.random.fold_in(rng.key_of(3, "train", 5), 0)
  wanted = levels.sample_levels(FLOW, key, (devices_main.ROWS,))
  np.testing.assert_array_equal(arms.t, wanted)


@pytest.mark.long
def test_rollouts_keep_levels_and_velocities():
  params, rows, empty = devices_main.initial()
  rollout = rollout_lib.make_rollout(
    *(devices_main.denoise, FLOW),
    mesh=sharding.make_mesh(),
    latent_shape=(devices_main.CHANNELS, 4, 4),
    num_steps=5,
    solver="dpm_solver",
    order=2,
    guidance=1.0,
    prompt_dropout=0.0,
    states_per_trajectory=5,
  )
  seen = rollout(params, 1, 2, rows["cond"], empty)
  sigma = np.sort(np.asarray(seen.t, np.float64), axis=1)
  u = sigma / (3 - 2 * sigma)
  # Every step was kept: one level of each fifth, equally far into it.
  offsets = 5 * u - np.arange(5)
  np.testing.assert_allclose(offsets, offsets[:, :1] * np.ones(5), atol=2e-5)
  assert offsets.min() > 0 and offsets.max() <= 1 + 1e-6
  given = schedules.timestep_input(FLOW, seen.t)
  for k in range(5):
    again = devices_main.denoise(params, seen.x_t[:, k], given[:, k], rows["cond"])
    np.testing.assert_allclose(seen.target[:, k], again, rtol=1e-4, atol=1e-5)
  # The rows' images are noised to the states' levels, and the states are the last arm.
  _, arms = _noised(losses.load_loss("dro").NEEDS, rollout=seen)
  np.testing.assert_array_equal(arms.t, seen.t.reshape(-1))
  np.testing.assert_array_equal(arms.x_t[:, 1], seen.x_t.reshape(-1, *seen.x_t.shape[2:]))


@pytest.mark.long
def test_a_steps_errors_are_of_the_chosen_space():
  """Errors of a train step in each space, against the factors of each row's level."""
  loss = losses.make_loss({"name": "dpo", "beta": 1.0, "variant": "sigmoid"})
  params, rows, empty = devices_main.initial("pairs")
  rows |= {
    "row": np.arange(devices_main.ROWS),
    "draw": np.ones(devices_main.ROWS, np.int32),
  }
  found = {}
  for space in ("model", "eps", "x0"):
    program = train_step.make_reference_errors(
      *(devices_main.denoise, FLOW, loss),
      arms=("w", "l"),
      prompt_dropout=0.0,
      space=space,
    )
    found[space] = program(params, 0, empty, rows)
  arms = batch_lib.make_arms(
    FLOW, loss.needs, rows, None, empty, seed=0, update=0, prompt_dropout=0.0
  )
  sigma = np.asarray(arms.t, np.float64)
  assert arms.t.dtype == jnp.float32 and len(set(arms.t.tolist())) == devices_main.ROWS
  given = 1000 * arms.t
  for i, arm in enumerate(("w", "l")):
    predicted = devices_main.denoise(params, arms.x_t[:, i], given, rows["cond"])
    own = schedules.denoising_error(predicted, arms.target[:, i])
    np.testing.assert_allclose(found["model"][arm], own, rtol=1e-4)
    np.testing.assert_allclose(found["eps"][arm], (1 - sigma) ** 2 * own, rtol=1e-3)
    np.testing.assert_allclose(found["x0"][arm], sigma**2 * own, rtol=1e-3)


@pytest.fixture(scope="module")
def flow_pipeline(tiny_pipeline, tmp_path_factory):
  """The tiny pipeline, its UNet taken for a velocity network."""
  directory = tmp_path_factory.mktemp("flow") / "pipeline"
  shutil.copytree(tiny_pipeline, directory)
  (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
  return directory


@pytest.fixture
def in_root(tfds_dir, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))


def test_what_a_model_does_not_have_is_one_line(
  flow_pipeline, tiny_pipeline, in_root, tmp_path, capsys, caplog
):
  cases = (
    (flow_pipeline, "dro", {"rollout.solver": "ddim"}, "the solver ddim is for"),
    (flow_pipeline, "dro", {"noise.density": "mode"}, "noise.density = 'mode' has no effect"),
    (flow_pipeline, "dpo", {"noise.scale": 0.5}, "noise.scale has no effect"),
    (tiny_pipeline, "dpo", {"noise.density": "mode"}, "is for models of flow matching"),
    (tiny_pipeline, "dpo", {"noise.shift": 3}, "is for models of flow matching"),
    (tiny_pipeline, "dpo", {"loss.space": "sigma"}, "'loss.space' must be one of model, v"),
  )
  for model, method, fields, message in cases:
    arguments = runs.arguments(model, tmp_path / "run", method, **fields)
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
  assert "takes defaults" not in caplog.text
  out = tmp_path / "model.safetensors"
  assert export.main([f"--workdir={flow_pipeline}", "--single-file", f"--out={out}"]) == 2
  assert "its UNet was trained with flow matching" in capsys.readouterr().err
  assert not out.exists()


@pytest.mark.long
def test_a_run_resumes_with_the_same_bits(flow_pipeline, in_root, tmp_path):
  """DRO's run is in test_flow_presets."""
  fields = {"noise.density": "logit_normal", "loss.space": "x0"}
  fields |= {"evaluate.num_prompts": 1, "evaluate.scorers": "()", "evaluate.num_examples": 0}
  fields["train.updates_per_iteration"] = 1
  whole, _ = runs.check_resumed(flow_pipeline, tmp_path, "dpo", updates=(1, 2), **fields)
  lines = runs.lines(whole)
  assert [line["step"] for line in lines] == [1, 2]
  assert all(np.isfinite(line["loss"]) and line["optim/grad_norm"] > 0 for line in lines)
  assert (whole / "report.html").exists()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A tiny UNet trained as a velocity network: its workdir."""
  workdir = tmp_path_factory.mktemp("flow") / "run"
  fields = {
    "unet.prediction_type": "flow_prediction",
    "noise.density": "logit_normal",
    "noise.shift": 2.0,
    "denoiser.num_updates": 100,
    "denoiser.batch_size": 8,
    "log_every": 20,
    "save_every": 100,
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  config = str(ROOT / "configs" / "shapes_base.py")
  assert pretrain.main([f"--config={config}:tiny", f"--workdir={workdir}", *flags]) == 0
  return workdir


@pytest.mark.long
def test_a_unet_learns_velocities(pretrained):
  lines = (pretrained / "denoiser" / "metrics.jsonl").read_text().splitlines()
  curve = [json.loads(line)["loss"] for line in lines]
  assert curve[-1] < 0.8 * curve[0], curve
  made = pipeline_lib.load_pipeline(str(pretrained / "pipeline"))
  assert made.schedule == flow.FlowSchedule(shift=2.0, inputs="truncated")
  assert "predicts\nflow_prediction" in (pretrained / "pipeline" / "README.md").read_text()


@pytest.mark.long
def test_solvers_agree_in_the_limit(pretrained):
  made = pipeline_lib.load_pipeline(str(pretrained / "pipeline"))
  mesh = sharding.make_mesh()
  prompts = ["a red circle", "two blue squares"]
  cond = jax.tree.map(np.asarray, encode.encode_prompts(made, mesh, prompts))

  def images(steps, order):
    generate = sampling.make_generator(
      made, mesh, num_steps=steps, guidance=2.0, batch_size=2, order=order
    )
    return generate(made.denoiser_params, cond, [0, 1]).astype(np.float64)

  exact = images(300, 2)
  far = {steps: np.abs(images(steps, 1) - exact).mean() for steps in (300, 20)}
  assert exact.std() > 5
  assert far[300] < 1 and far[20] > 5 * far[300], far


@live
@pytest.mark.long
def test_images_are_those_of_diffusers_pipeline(pretrained):
  import diffusers
  import torch

  directory = str(pretrained / "pipeline")
  made, mesh = pipeline_lib.load_pipeline(directory), sharding.make_mesh()
  cond = jax.tree.map(np.asarray, encode.encode_prompts(made, mesh, ["a red circle"]))
  generate = sampling.make_generator(made, mesh, num_steps=10, guidance=2.0, batch_size=1)
  ours = generate(made.denoiser_params, cond, [4])[0]
  key = rng.key_of(0, "generate", 4)[None]
  noise = sampler_lib.initial_noise(key, made.latent_shape)
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(directory)
  theirs.set_progress_bar_config(disable=True)
  found = theirs(
    "a red circle",
    num_inference_steps=10,
    guidance_scale=2.0,
    latents=torch.tensor(np.asarray(noise)),
    output_type="np",
  ).images[0]
  assert np.abs(255 * found - ours).max() < 1.0
