"""Alarms: the divergence from the base, looks during a run, and a run that stops."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pathwise_main as toy
import pytest
import runs
from conftest import ROOT

from jaxpref import base_config, main
from jaxpref import config as config_lib
from jaxpref.diffusion import ddim, timesteps
from jaxpref.rewards import likelihood
from jaxpref.runtime import checkpoint_files
from jaxpref.training import alarms


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_the_divergence_is_that_of_ancestral_steps(final):
  """Against the means and deviations of DDIM's steps with eta = 1."""
  grid = timesteps.uniform_grid(toy.SCHEDULE, 7, 2, steps_offset=1, final=final)
  table = ddim.coefficients(grid, eta=1.0)
  x_t, x0, other = (toy.random(seed, 2, 3, 4) for seed in range(3))
  for k in range(grid.num_steps):
    step = likelihood.step_at(table, jnp.full(2, k))
    (mean, std), (mean_ref, _) = (likelihood.step_moments(step, x_t, x) for x in (x0, other))
    want = 12 * likelihood.gaussian_kl(mean, mean_ref, std)  # of a mean over 3 x 4 elements
    found = likelihood.ancestral_kl(x0, other, grid.log_snr[k], grid.log_snr[k + 1])
    np.testing.assert_allclose(found, want, rtol=2e-3)
    assert (np.asarray(found) == 0).all() == (final == "zero" and k == grid.num_steps - 1)


def test_a_look_measures_the_divergence_of_two_models():
  """Models that differ by a constant prediction have a divergence in closed form."""

  def denoise(params, x_t, t, cond):
    return jnp.tanh(x_t) + params

  pipeline = types.SimpleNamespace(
    modules={"vae": toy.Vae()},
    **{"latent_shape": toy.SHAPE, "schedule": toy.SCHEDULE, "spacing": lambda: toy.SPACING},
  )
  sample = alarms.make_sampler(denoise, pipeline, num_steps=4, guidance=1.0)
  give = lambda params, base: sample(  # noqa: E731
    params, base, toy.VAE_PARAMS, toy.COND, toy.GUIDE, toy.SEEDS
  )
  pixels, nothing = give(0.0, 0.0)
  assert pixels.shape == (toy.ROWS, 3, 3, 2) and np.max(nothing) < 1e-9
  _, found = give(0.3, 0.0)
  bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[[751, 501, 251, 1, 0]]
  snr = bar / (1 - bar)
  want = 0.5 * np.diff(snr) * 18 * 0.3**2 / snr[:-1]  # |dx0|^2 = sigma^2 / alpha^2 |deps|^2
  np.testing.assert_allclose(found, np.broadcast_to(want[:, None], (4, toy.ROWS)), rtol=2e-3)


def colored(of_policy):
  """Images of two models for any prompts: the policy's are redder, and greener or not."""

  def make(prepared, prompts, each):
    rng = np.random.default_rng(0)

    def look(params, base):
      images = rng.integers(90, 110, (len(prompts) * each, 8, 8, 3)).astype(np.uint8)
      images[..., 0] += np.uint8(40) * (params is not base)
      images[..., 1] -= np.uint8(40) * (params is not base and of_policy == "hacked")
      return images, np.ones((3, len(images)))

    return look

  return make


def test_the_scorers_that_a_run_learns_from():
  """A latent judge is none of them; what stands for it in the alarms judges without a bias."""
  assert base_config.reward_scorers(config_lib.load_config("dpo:shapes")) == ()
  for name in ("ppo", "draft", "spo"):
    config = config_lib.load_config(f"{name}:shapes")
    assert base_config.reward_scorers(config) == base_config.trained_scorers(config) != ()
  config = config_lib.load_config("lpo:shapes")
  config.steps.judge = "runs/judge"
  assert base_config.reward_scorers(config) == () != base_config.trained_scorers(config)


@pytest.mark.long
def test_a_run_stops_where_its_reward_is_exploited(
  tiny_pipeline, tfds_dir, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  fields = {
    "rounds.scorers": "('toy_scorers.red',)",
    "evaluate.scorers": "('toy_scorers.green', 'toy_scorers.red')",
    "evaluate.num_prompts": 12,
    "alarms.num_prompts": 12,
    "train.stop_on_hacking": True,
  }

  def run(name, **more):
    return main.main(runs.arguments(tiny_pipeline, tmp_path / name, "best_of", **fields | more))

  with monkeypatch.context() as patch:
    patch.setattr(alarms, "_make_look", colored("hacked"))
    assert run("hacked") == 4
  error = capsys.readouterr().err
  assert "policy against base: toy_scorers.red-1 (+" in error
  assert "which is trained on, rises, but toy_scorers.green-1 (-" in error
  assert "Stopped, saved after update 2 of 4" in error
  assert checkpoint_files.steps(tmp_path / "hacked" / "checkpoints") == [2]
  record = json.loads((tmp_path / "hacked/alarms/2.json").read_text())
  assert len(record["prompts"]) == len(record["scores"]["toy_scorers.red"]) == 12
  line = runs.lines(tmp_path / "hacked")[-1]
  mean = np.mean(record["scores"]["toy_scorers.green"])
  assert line["alarm/toy_scorers.green"] == pytest.approx(mean)
  assert line["alarm/kl"] == 3 and 1 < line["alarm/vendi"] < 12
  # It goes on with the same command, told not to stop; then alarms look at real images.
  assert run("hacked", **{"train.stop_on_hacking": False}) == 0
  results = json.loads((tmp_path / "hacked/evaluation/4/results.json").read_text())
  marked = {key: entry["selected_training_data"] for key, entry in results.items()}
  assert marked == {"toy_scorers.green-1": False, "toy_scorers.red-1": True}
  last = runs.lines(tmp_path / "hacked")[-1]
  assert last["step"] == 4 and last["alarm/kl"] > 0 and last["alarm/kl"] != 3
  with monkeypatch.context() as patch:
    patch.setattr(alarms, "_make_look", colored("better"))
    assert run("better") == 0  # the other scorer does not fall
