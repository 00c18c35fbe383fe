"""Updates through sampler, decoder and scorer, against a sampler that is written out."""

import json

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pathwise_main as toy
import pytest
import runs

from jaxpref import config as config_lib
from jaxpref import losses
from jaxpref import rng as rng_lib
from jaxpref.errors import UserError
from jaxpref.losses.reward import reward_loss
from jaxpref.training import pathwise_settings, pathwise_step

# Levels of Stable Diffusion at the steps' inputs, and of the end: that of timestep 0.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
TIMES = [751, 501, 251, 1]
BAR = np.append(np.cumprod(1 - BETAS)[TIMES], 1 - BETAS[0])
ALPHA, SIGMA = np.sqrt(BAR), np.sqrt(1 - BAR)


def noise_of(purpose):
  """The noise of each seed, by the definition of a seed's key."""
  keys = [rng_lib.key_of(0, "generate", seed) for seed in toy.SEEDS]
  return jnp.stack([
    jax.random.normal(jax.random.fold_in(key, purpose), toy.SHAPE) for key in keys
  ])  # fmt: skip


def predict(params, x, t, scale):
  times = jnp.full(toy.ROWS, t)
  with_prompt = toy.denoise(params, x, times, toy.COND)
  if scale <= 1:
    return with_prompt
  nothing = {"text": jnp.repeat(toy.GUIDE["text"], toy.ROWS, axis=0)}
  without = toy.denoise(params, x, times, nothing)
  return without + scale * (with_prompt - without)


def step(params, x, k, scale, z=None):
  """One step of DDIM; with noise z its eta is 1."""
  eps = predict(params, x, TIMES[k], scale)
  x0 = (x - SIGMA[k] * eps) / ALPHA[k]
  if z is None:
    return ALPHA[k + 1] * x0 + SIGMA[k + 1] * eps
  std = SIGMA[k + 1] / SIGMA[k] * np.sqrt(1 - BAR[k] / BAR[k + 1])
  return ALPHA[k + 1] * x0 + np.sqrt(SIGMA[k + 1] ** 2 - std**2) * eps + std * z


def reward(latents):
  raw = latents / 0.5 + 0.1
  image = jnp.tanh(jnp.einsum("bchw,cd->bdhw", raw, toy.VAE_PARAMS))
  unit = jnp.clip(image.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
  return 0.7 * toy.score(toy.SCORER_PARAMS, unit, toy.TOKENS["toy"])


def written_out(params, path, frozen, chosen=None):
  """The mean reward, the steps one after the other; `frozen` has no gradient."""
  x, scale = noise_of(0), path.guidance
  if path.method == "predicted":
    for k in range(chosen):
      x = step(frozen, x, k, scale)
    eps = predict(params, x, TIMES[chosen], scale)
    return reward((x - SIGMA[chosen] * eps) / ALPHA[chosen]).mean()
  first = toy.STEPS if path.method == "renoised" else toy.STEPS - path.last
  for k in range(toy.STEPS):
    x = step(params if k >= first else frozen, x, k, scale)
  if path.method == "last":
    return reward(x).mean()
  again = [ALPHA[3] * x + SIGMA[3] * noise_of(1 + n) for n in range(path.repeats)]
  return jnp.mean(jnp.stack([reward(step(params, y, 3, scale)).mean() for y in again]))


PATHS = {
  "DRaFT-1": {"last": 1},
  "DRaFT-2": {"last": 2},
  "DRaFT": {"last": 4},
  "without guidance": {"last": 2, "guidance": 1.0},
  "DRaFT-LV": {"method": "renoised", "repeats": 3},
  "ReFL": {"method": "predicted", "first": 2, "end": 3},
}


@pytest.mark.parametrize("name", PATHS)
def test_an_updates_gradient_is_that_of_the_sampler_written_out(name):
  path = toy.PATH._replace(**PATHS[name])
  chosen = path.first if path.method == "predicted" else None
  value, want = jax.value_and_grad(written_out)(toy.PARAMS, path, toy.PARAMS, chosen)
  after, (metrics,) = toy.update(path, accumulate=2)
  assert metrics["reward/mean"] == pytest.approx(float(value), rel=1e-5)
  assert metrics["loss"] == -metrics["reward/mean"]
  assert metrics["reward/toy"] == pytest.approx(metrics["reward/mean"] / 0.7, rel=1e-5)
  for part in want:
    moved = after[part] - toy.PARAMS[part]  # a descent of -reward at a rate of 1
    np.testing.assert_allclose(moved, want[part], rtol=2e-4, atol=2e-6)
  # Not by chance: another number of steps has another gradient.
  other = jax.grad(written_out)(
    *(toy.PARAMS, toy.PATH._replace(last=3, guidance=path.guidance), toy.PARAMS)
  )
  assert np.abs(other["mix"] - want["mix"]).max() > 1e-3


def test_a_random_number_of_steps_has_the_gradient_of_that_number():
  """AlignProp: as many last steps learn as were drawn, in one program for all."""
  path = toy.PATH._replace(last=4, mean=2.5, std=2.0)
  keys = [rng_lib.key_of(3, "pathwise", update) for update in range(200)]
  drawn = [int(pathwise_step.sample_step(path, key)) for key in keys]
  assert set(drawn) == {1, 2, 3, 4} and np.mean(drawn) == pytest.approx(2.5, abs=0.25)
  want = jax.grad(written_out)(toy.PARAMS, path._replace(last=drawn[0]), toy.PARAMS)
  after, _ = toy.update(path)
  moved = after["mix"] - toy.PARAMS["mix"]
  np.testing.assert_allclose(moved, want["mix"], rtol=2e-4, atol=2e-6)


def test_noise_of_the_steps_is_drawn_anew_in_both_parts():
  """With eta = 1, the first steps have the noise of one key, the last of another."""
  path = toy.PATH._replace(eta=1.0, last=2, guidance=1.0)
  keys = [rng_lib.key_of(0, "generate", seed) for seed in toy.SEEDS]

  def z(k):
    part, number = (0, k) if k < 2 else (1, k - 2)
    folded = [jax.random.fold_in(jax.random.fold_in(key, part), number + 1) for key in keys]
    return jnp.stack([jax.random.normal(key, toy.SHAPE) for key in folded])

  x = noise_of(0)
  for k in range(toy.STEPS):
    x = step(toy.PARAMS, x, k, 1.0, z(k))
  _, (metrics,) = toy.update(path)
  assert metrics["reward/mean"] == pytest.approx(float(reward(x).mean()), rel=1e-4)


def test_rewards_become_losses_as_published():
  found = jnp.array([1.0, 2.5])
  want = {"linear": [-2.0, -5.0], "distance": [2.0, 1.0], "hinge": [2.0, 0.0]}
  for variant, losses_ in want.items():
    got = reward_loss(found, variant=variant, target=2.0, scale=2.0)
    np.testing.assert_allclose(got, losses_)
  with pytest.raises(UserError, match="loss.variant must be one of linear"):
    reward_loss(found, variant="square")


CASES = [
  {"data": 8, "path": {}},
  {"data": 4, "accumulate": 2, "path": {"method": "renoised"}},
  {"data": 2, "fsdp": 4, "path": {"last": 4, "mean": 2.0, "std": 1.0, "eta": 1.0}},
  {"data": 1, "fsdp": 8, "path": {"method": "predicted", "first": 1, "end": 4}},
]


@pytest.mark.long
def test_eight_devices_equal_one():
  results = conftest.on_eight_devices(toy.__file__, json.dumps(CASES))
  for case, found in zip(CASES, results, strict=True):
    assert found["devices"] == 8
    params, history = toy.update(toy.PATH._replace(**case["path"]), updates=2)
    for name, value in params.items():
      np.testing.assert_allclose(found["params"][name], value, rtol=1e-4, atol=1e-6)
    for got, want in zip(found["history"], history, strict=True):
      np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
    assert history[0]["loss"] != history[1]["loss"]


@pytest.mark.long
def test_a_run_in_two_parts_ends_with_the_bits_of_a_whole_one(
  tiny_pipeline, tfds_dir, tmp_path, monkeypatch
):
  """With random numbers of steps, noise of the steps, LoRA, and more than a pass of prompts."""
  monkeypatch.chdir(conftest.ROOT)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
  fields = {"lora.rank": 2, "train.accumulate": 2, "data.num_experts": 12}
  whole, parts = runs.check_resumed(
    tiny_pipeline, tmp_path, "alignprop", updates=(18, 20), **fields
  )
  ours, theirs = (runs.lines(at)[-1] for at in (parts, whole))
  for name in ("reward/mean", "reward/shapes.preference", "alarm/kl", "alarm/vendi"):
    assert ours[name] == theirs[name]
  assert theirs["alarm/kl"] > 0 and theirs["optim/grad_norm"] > 0
  names = sorted(path.name for path in (whole / "alarms").iterdir())
  assert names == sorted(f"{k}.json" for k in range(2, 21, 2))


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("draft", {"loss.name": "dpo"}, "loss 'dpo' learns from pairs: the section pathwise"),
    ("draft", {"pathwise.weights": (1.0, 2.0)}, "one entry for each scorer (got 1 and 2)"),
    ("draft", {"pathwise.last": 3}, "must be at most rollout.num_steps = 2"),
    ("alignprop", {"pathwise.mean": 3.0}, "must be at most pathwise.last = 2"),
    ("refl", {"pathwise.end": 9}, "must be a range within rollout.num_steps = 2 steps"),
    ("draft_lv", {"rollout.num_steps": 1}, "needs at least rollout.num_steps = 2"),
    ("refl", {"pathwise.eta": 0.5}, "applies to pathwise.method = 'last', not 'predicted'"),
    ("draft", {"rollout.solver": "ddpm"}, "gradients go through ddim's steps"),
    ("draft", {"data.prompt_dropout": 0.1}, "data.prompt_dropout must be 0"),
    ("draft", {"data.flip": True}, "data.flip = True does not apply to updates that sample"),
  ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, message):
  config = runs.config(method, **changes)
  needs = losses.load_loss(config.loss.name).NEEDS
  with pytest.raises(UserError) as error:
    pathwise_settings.check(config, needs)
  assert message in str(error.value)


def test_the_loss_of_rewards_needs_its_section():
  config = config_lib.load_config("dpo:tiny")
  with pytest.raises(UserError, match=r"call base_config.pathwise\(c\)"):
    pathwise_settings.check(config, losses.load_loss("reward").NEEDS)
