"""Rows of sampler steps: log-probabilities, windows, and the gradient of a whole update."""

import dataclasses

import devices_main
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import config as config_lib
from jaxpref import losses, sharding
from jaxpref.diffusion import flow, flow_steps, guidance
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedules
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.losses import ppo
from jaxpref.models import load_pipeline
from jaxpref.training import step_rows, train_step

LONG = pytest.mark.long
FLOW = flow.FlowSchedule(shift=3.0)
NOISE = schedules.make_schedule(prediction_type="v_prediction")
SHAPE = (devices_main.CHANNELS, 4, 4)
STEPS = 6
# Solver, schedule, strength of each step's noise, and which steps are taken.
CASES = [
  ("ddim", NOISE, [1.0] * 6, [[0, 2, 5]] * 4),
  pytest.param("ddim", NOISE, [0, 0.5, 0.5, 0.5, 0, 0], [[1, 2, 3]] * 4, marks=LONG),
  ("flow_sde", FLOW, [0.7] * 6, [[0, 1, 4], [1, 2, 3], [0, 3, 4], [2, 3, 4]]),
  pytest.param("flow_sde", FLOW, [0, 0, 0.7, 0.7, 0.7, 0], [[2, 3, 4]] * 4, marks=LONG),
  pytest.param("dance_sde", FLOW, [0.3] * 6, [[0, 2, 4]] * 4, marks=LONG),
  pytest.param("cps", FLOW, [0.8] * 6, [[0, 2, 4]] * 4, marks=LONG),
]


def grid_of(schedule, rows=4):
  if schedule is FLOW:
    return timesteps_lib.uniform_grid(
      schedule, STEPS, rows, spacing="linspace", visit_lowest=True
    )
  options = {"steps_offset": 1, "visit_lowest": True, "final": "sigma_min"}
  return timesteps_lib.uniform_grid(schedule, STEPS, rows, **options)


def sample(solver, schedule, eta, picks, scale=3.0):
  """Samples four rows; returns the steps, all states, and the table."""
  params, rows, empty = devices_main.initial()
  cond, keys = rows["cond"][:4], jax.random.split(jax.random.key(5), 4)

  @jax.jit
  def run(params, cond, eta, picks):
    guided = guidance.classifier_free(
      lambda *a: devices_main.denoise(params, *a), cond, empty, scale
    )
    grid = grid_of(schedule)
    x0, seen = sampler_lib.sample(
      *(guided, sampler_lib.initial_noise(keys, SHAPE), grid, schedule),
      **{"solver": solver, "eta": eta, "key": keys, "trajectory": True},
    )
    table = sampler_lib.coefficients(grid, solver=solver, eta=eta)
    return (
      step_rows.take(seen.states, x0, grid, table, schedule, picks),
      jnp.concatenate([seen.states, x0[None]]),
      table,
    )

  found = run(params, cond, jnp.float32(np.array(eta)), jnp.array(picks))
  return (*found, keys, params, cond, empty)


@pytest.mark.parametrize(("solver", "schedule", "eta", "picks"), CASES)
def test_log_probabilities_from_stored_steps_are_the_samplers(solver, schedule, eta, picks):
  steps, _, table, keys, params, cond, empty = sample(solver, schedule, eta, picks)
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
  batch = {"latents": flat.latents, "cond": np.repeat(cond, 3, 0), "labels": flat.labels}
  residual = jax.jit(
    lambda params: step_rows.residuals(
      *(devices_main.denoise, schedule, 3.0, params, empty),
      step_rows.make_arms(batch, "x"),
      "x",
    )["x"]
  )(params)
  density = "square" if solver == "cps" else "gaussian"  # as these methods compare steps
  got = ppo.log_prob_of(residual, flat.labels["std"], density=density)
  noise = np.stack([sampler_lib.step_noise(keys, k, SHAPE) for k in range(STEPS)])
  z = np.float64(noise[np.array(picks), np.arange(4)[:, None]])
  std = np.float64(table.noise[np.array(picks), np.arange(4)[:, None]])
  assert (std > 0).all()
  square = np.square(z).mean((2, 3, 4))
  want = -square / 2 - np.log(std) - np.log(2 * np.pi) / 2
  if density == "square":
    want = -square * std**2
  np.testing.assert_allclose(got, want.ravel(), rtol=1e-6, atol=1e-6)
  # The gain is the change of the mean with the prediction.
  moved = lambda p, *a: devices_main.denoise(p, *a) + 0.1  # noqa: E731
  other = step_rows.residuals(
    *(moved, schedule, 3.0, params, empty), step_rows.make_arms(batch, "x"), "x"
  )["x"]
  change = np.abs(other - residual).mean((1, 2, 3))
  np.testing.assert_allclose(change, 0.1 * flat.labels["gain"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ("solver", "schedule"), [("ddim", NOISE), pytest.param("flow_sde", FLOW, marks=LONG)]
)
def test_before_a_window_the_path_is_that_without_noise(solver, schedule):
  _, states, *_ = sample(solver, schedule, [0, 0, 0.6, 0.6, 0, 0], [[2, 3, 3]] * 4)
  _, plain, *_ = sample(solver, schedule, [0.0] * 6, [[2, 3, 3]] * 4)
  np.testing.assert_array_equal(states[:3], plain[:3])
  assert (states[3] != plain[3]).any()


@pytest.mark.parametrize("solver", ["flow_sde", "dance_sde", "cps"])
def test_a_flows_coefficients_are_its_steps(solver):
  grid, eta = grid_of(FLOW, rows=2), jnp.array([0.0, 0.4, 0.4, 0.0, 0.4, 0.4])
  table = sampler_lib.coefficients(grid, solver=solver, eta=eta)
  x, v = np.random.default_rng(3).normal(size=(2, 2, 5))
  sigma = np.append(np.asarray(grid.timesteps[:, 0], np.float64), 0.0)
  for k in range(STEPS):
    level, after = (jnp.full(2, s) for s in sigma[k : k + 2])
    # The step to a clean image has no noise.
    noisy = eta[k] * (k < STEPS - 1)
    if solver == "cps":
      mean, std = flow_steps.preserving_moments(x, v, level, after, a=noisy)
    else:
      g = jnp.full(2, noisy)
      if solver == "flow_sde":
        g = flow_steps.flow_sde_noise(level, sigma[1], a=noisy)
      mean, std = flow_steps.sde_moments(x, v, level, after, g)
    got = table.state[k, 0] * x + table.data[k, 0, 0] * (x - sigma[k] * v)
    np.testing.assert_allclose(got, mean, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(table.noise[k], std, rtol=1e-5)
    assert (std > 0).all() == (noisy > 0)


# -------------------------------------------------------------------- settings of a run


def tiny(pipeline, **fields):
  config = config_lib.load_config("ppo:tiny")
  with config.unlocked():
    for name, value in fields.items():
      section, field = name.split("__")
      config[section][field] = value
  return config, load_pipeline(str(pipeline))


def test_windows_move(tiny_pipeline):
  config, pipeline = tiny(tiny_pipeline, rollout__num_steps=8, steps__window=3, steps__hold=2)
  plan = step_rows.plan_steps(config, pipeline)
  assert plan == (8, 7, 3, 3, 0)  # the last step ends at a clean image
  starts = [step_rows.etas(config, plan, number)[1] for number in range(12)]
  assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
  eta, _ = step_rows.etas(config, plan, 4)
  assert eta.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
  assert step_rows.pick(plan, 2, 5, [0, 4]).tolist() == [[2, 3, 4]] * 5
  with config.unlocked():
    config.steps.hold = 0
  at_random = [step_rows.etas(config, plan, number)[1] for number in range(40)]
  assert set(at_random) == {0, 1, 2, 3}  # in the first half


def test_trained_steps_are_distinct_and_random(tiny_pipeline):
  config, pipeline = tiny(tiny_pipeline, rollout__num_steps=8, steps__trained=2)
  plan = step_rows.plan_steps(config, pipeline)
  picks = step_rows.pick(plan, 0, 700, [0, 1])
  assert picks.shape == (700, 2) and (np.diff(picks) > 0).all()
  counts = np.bincount(picks.ravel(), minlength=7)
  assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()
  assert (step_rows.pick(plan, 0, 700, [0, 2]) != picks).any()
  np.testing.assert_array_equal(step_rows.pick(plan, 0, 700, [0, 1]), picks)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rollout__solver": "dpm_solver"}, "'dpm_solver' has no noise of a chosen strength"),
    ({"rollout__solver": "flow_sde"}, "flow_sde is for flow-matching models"),
    ({"steps__eta": 1.5}, "steps.eta must be at most 1 for ddim"),
    ({"steps__trained": 4}, "3 of the 4 steps of ddim have noise"),
    ({"steps__window": 2, "steps__trained": 3}, "steps.trained = 3 of steps.window = 2"),
    ({"data__prompt_dropout": 0.1}, "data.prompt_dropout must be 0"),
    ({"loss__space": "eps"}, "loss.space must be 'model'"),
    ({"noise__density": "mode"}, "the section noise has no effect"),
    ({"rounds__old_decay": 0.5}, "rounds.old_decay must be 0 unless rounds.sampler = 'old'"),
    ({"train__batch_size": 8}, "must be a multiple of the 3 steps"),
    ({"steps__trained": 2}, "loss 'ppo' learns from whole trajectories"),
    ({"rounds__images_per_prompt": 3}, "rounds.images_per_prompt must be even"),
  ],
)
def test_settings_of_steps_that_do_not_fit_are_refused(tiny_pipeline, fields, message):
  config, pipeline = tiny(tiny_pipeline, **fields)
  kind = "paths" if "whole trajectories" in message or "even" in message else "steps"
  with pytest.raises(UserError) as error:
    step_rows.check(config, pipeline, kind)
  assert message in str(error.value)


def test_images_of_a_prompt_may_start_from_one_noise(tiny_pipeline):
  config, pipeline = tiny(tiny_pipeline, rounds__images_per_prompt=2)
  seeds = np.array([3, 5, 7, 9], np.uint32)
  assert step_rows.start_seeds(config, seeds).tolist() == [3, 5, 7, 9]
  with config.unlocked():
    config.steps.common_start = True
  starts = step_rows.start_seeds(config, seeds)
  assert starts.tolist() == [3, 3, 7, 7]
  settings = {"num_steps": 2, "solver": "ddim", "order": 2, "starts": starts}

  def sampled(eta):
    nothing = lambda x, t: 0 * x  # noqa: E731
    return sampling.sample_seeds(
      *(nothing, seeds, pipeline, SHAPE), **settings, eta=jnp.array(eta)
    )

  plain, noisy = sampled([0.0, 0.0]), sampled([1.0, 0.0])
  np.testing.assert_array_equal(plain[0], plain[1])
  assert (plain[0] != plain[2]).all() and (noisy[0] != noisy[1]).all()


def test_guidance_is_trained_if_it_samples():
  config = config_lib.load_config("ppo:sd15")
  assert step_rows.training_guidance(config) == 5.0
  with config.unlocked():
    config.steps.guided = False
  assert step_rows.training_guidance(config) == 1.0


def test_what_is_needed_follows_from_the_settings():
  loss = config_lib.load_config("ppo:tiny").loss
  assert losses.make_loss(loss).needs == ppo.NEEDS
  assert losses.make_loss(loss, updates=2).needs == dataclasses.replace(ppo.NEEDS, old=True)
  with loss.unlocked():
    loss.weight_reference = 0.1
  assert losses.make_loss(loss).needs == dataclasses.replace(ppo.NEEDS, reference=True)


# ------------------------------------------------------------ a whole update of a linear model


def linear(params, x_t, t, cond):
  del t
  told = (cond.mean(1) @ params["told"])[:, :, None, None]
  return params["slope"][:, None, None] * x_t + told


def mean_of(labels, rows, empty, scale):
  """The steps' means as a function of parameters, and its slope; float64, [N, ...]."""
  x = np.float64(rows["latents"][:, 0])
  empty = np.broadcast_to(empty, rows["cond"].shape)
  without, with_text = (np.float64(of).mean(1) for of in (empty, rows["cond"]))
  told = without + scale * (with_text - without)  # guided text, since the model is linear
  column = lambda name: np.float64(labels[name])[:, None, None, None]  # noqa: E731
  alpha = np.sqrt(1 / (1 + np.exp(-column("log_snr"))))
  factor = -column("data") * np.sqrt(1 - alpha**2) / alpha  # of a prediction of noise

  def mean(of):
    predicted = of["slope"][:, None, None] * x + (told @ of["told"])[:, :, None, None]
    return column("state") * x + column("data") * x / alpha + factor * predicted

  def pull(by_mean):
    """From derivatives by the means to derivatives by the parameters."""
    by_prediction = by_mean * factor
    by_told = np.einsum("nd,nc->dc", told, by_prediction.sum((2, 3)))
    return {"slope": (by_prediction * x).sum((0, 2, 3)), "told": by_told}

  return mean, pull, column("std")


def closed_form(params, base, rows, empty, labels, scale, weight):
  """The gradient of -A log p + weight KL by hand, where the ratio is 1."""
  mean, pull, std = mean_of(labels, rows, empty, scale)
  residual = np.float64(rows["latents"][:, 1]) - mean(params)
  apart = mean(params) - mean(base)
  advantage = np.float64(labels["advantage"])[:, None, None, None]
  return pull((-advantage * residual + weight * apart) / std**2 / residual.size)


def updated(name, params, base, rows, empty, scale, accumulate, **hyper):
  """One update of plain gradient descent; returns the gradient and the metrics."""
  loss = losses.make_loss({"name": name, **devices_main.HYPER[name], **hyper})
  mesh, tx = sharding.make_mesh(), optax.sgd(1.0)
  make_state = lambda p: train_step.init_state(p, tx, seed=0, lagging_copy=False)  # noqa: E731
  step = train_step.make_train_step(
    *(linear, schedules.make_schedule(), loss, tx),
    mesh=mesh,
    state_sharding=sharding.params_sharding(mesh, jax.eval_shape(make_state, params)),
    arms=("a", "b") if name == "prdp" else ("x",),
    learning_rate=optax.constant_schedule(1.0),
    ema_decay=0.9,
    prompt_dropout=0.0,
    accumulate=accumulate,
    guidance=scale,
  )
  batch = sharding.place_batch(rows, mesh)
  state, metrics = step(make_state(params), base, None, batch, None, None, empty)
  return {name: params[name] - state.params[name] for name in params}, metrics


def linear_models():
  rng = np.random.default_rng(8)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  return ({"slope": 0.3 * draw(4), "told": 0.3 * draw(devices_main.WIDTH, 4)} for _ in "ab")


@pytest.mark.parametrize("accumulate", [1, pytest.param(4, marks=LONG)])
def test_an_updates_gradient_is_that_of_the_equation(accumulate):
  params, base = linear_models()
  _, rows, empty = devices_main.initial("steps")
  scale, weight = 3.0, 0.2
  got, metrics = updated(
    *("ppo", params, base, rows, empty, scale, accumulate), weight_reference=weight
  )
  want = closed_form(params, base, rows, empty, rows["labels"], scale, weight)
  for name, of in want.items():
    np.testing.assert_allclose(got[name], of, rtol=2e-4, atol=1e-6)
  assert metrics["ratio/mean"] == 1 and metrics["distance/steps"] > 0
  assert np.abs(want["slope"]).min() > 1e-3


@pytest.mark.parametrize("accumulate", [1, pytest.param(4, marks=LONG)])
def test_a_pairs_gradient_is_that_of_the_equation(accumulate):
  """Of (beta (u_a - u_b) - (A_a - A_b))^2, with u the sum of five steps' log-ratios."""
  params, base = linear_models()
  _, rows, empty = devices_main.initial("paths")
  scale, beta = 3.0, 0.8
  got, metrics = updated(*("prdp", params, base, rows, empty, scale, accumulate), beta=beta)
  count, steps = len(rows["cond"]), devices_main.STEPS
  flat = {
    "latents": rows["latents"].reshape(-1, *rows["latents"].shape[3:]),
    "cond": np.repeat(rows["cond"], 2 * steps, axis=0),
  }
  labels = {k: v.reshape(-1) for k, v in rows["labels"].items() if k != "advantage"}
  mean, pull, std = mean_of(labels, flat, empty, scale)
  after = np.float64(flat["latents"][:, 1])
  residual, other = after - mean(params), after - mean(base)
  log_ratio = ((other**2 - residual**2) / (2 * std**2)).mean((1, 2, 3))
  u = log_ratio.reshape(count, 2, steps).sum(2)
  advantage = np.float64(rows["labels"]["advantage"])
  gap = beta * (u[:, 0] - u[:, 1]) - (advantage[:, 0] - advantage[:, 1])
  sign = np.repeat(np.stack([gap, -gap], 1).reshape(-1), steps)[:, None, None, None]
  want = pull(2 * beta * sign / count * residual / std**2 / residual[0].size)
  assert metrics["loss"] == pytest.approx((gap**2).mean(), rel=1e-4)
  for name, of in want.items():
    np.testing.assert_allclose(got[name], of, rtol=5e-4, atol=1e-4 * np.abs(of).max())
  assert abs(metrics["prdp/log_ratio"]) > 0.01
