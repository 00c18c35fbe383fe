"""Samplers against PyTorch diffusers, closed forms and their own promises."""

import functools
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live
from golden import make_samplers as golden
from scipy import integrate

from jaxpref.diffusion import ddim, ddpm, dpm_solver
from jaxpref.diffusion import sampler as samplers
from jaxpref.diffusion import timesteps as timesteps_lib
from jaxpref.diffusion.schedule import make_schedule, schedule_from_config
from jaxpref.errors import UserError
from jaxpref.models import pipeline
from jaxpref.models.families import sdxl, stable_diffusion

ROWS = golden.SHAPE[1:]


def _denoise(x_t, t):
  return golden.denoise(x_t, t.reshape(-1, 1, 1), jnp.tanh, golden.MIXING)


@functools.partial(jax.jit, static_argnames=("solver", "order", "lower_order_final", "eta"))
def _states(x_T, noise, levels, schedule, **options):
  """All states [N + 1, B, ...] of a sampler that is given its noise."""
  keys = jax.random.split(jax.random.key(0), x_T.shape[0])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(samplers, "step_noise", lambda key, k, shape: noise[k])
    x0, seen = samplers.sample(
      _denoise, x_T, levels, schedule, key=keys, trajectory=True, **options
    )
  return jnp.concatenate([seen.states, x0[None]])


@functools.cache
def _run_case(name):
  """Our timesteps [N] and states [N + 1, B, ...] of a golden case."""
  case = golden.CASES[name]
  schedule = make_schedule(**case["schedule"])
  sigma_min = not case.get("set_alpha_to_one", True)
  levels = timesteps_lib.uniform_grid(
    schedule,
    case["steps"],
    golden.SHAPE[0],
    spacing=case.get("timestep_spacing", "linspace"),
    steps_offset=case.get("steps_offset", 0),
    visit_lowest=case["solver"] != "dpm_solver",
    karras=case.get("use_karras_sigmas", False),
    final=case.get("final_sigmas_type", "sigma_min" if sigma_min else "zero"),
  )
  states = _states(
    *golden.start_and_noise(name),
    levels,
    schedule,
    solver=case["solver"],
    order=case.get("solver_order", 2),
    lower_order_final=case.get("lower_order_final", True),
    eta=case.get("eta", 0.0),
  )
  return np.array(levels.timesteps[:, 0]), np.array(states)


def _assert_same_trajectory(name, timesteps, states):
  ours_t, ours = _run_case(name)
  np.testing.assert_array_equal(ours_t, timesteps)
  assert ours.shape == states.shape
  size = np.abs(states).max(axis=(1, 2, 3))
  assert np.all(np.abs(ours - states).max(axis=(1, 2, 3)) < 1e-4 * size)


@pytest.mark.parametrize("name", golden.CASES)
def test_trajectory_matches_golden_numbers(name):
  with np.load(golden.PATH) as stored:
    _assert_same_trajectory(name, stored[f"{name}/timesteps"], stored[f"{name}/states"])


@live
@pytest.mark.parametrize("name", golden.CASES)
def test_trajectory_matches_diffusers_live(name):
  _assert_same_trajectory(name, *golden.run_diffusers(name))


SD15 = families.real_configs("sd15")["scheduler"]
FILES = {  # SD 1.5's own scheduler file, and old or odd ones
  "own": SD15,
  "leading, no offset": {**SD15, "timestep_spacing": "leading", "steps_offset": 0},
  "leading, offset unsaid": {
    **{k: v for k, v in SD15.items() if k != "steps_offset"},
    "timestep_spacing": "leading",
  },
  "DDIM of its class's defaults": {
    **SD15,
    **{"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 0},
  },
  "DDIM, offset and more unsaid": {
    **{k: SD15[k] for k in ("beta_start", "beta_end", "beta_schedule")},
    "_class_name": "DDIMScheduler",
    "timestep_spacing": "leading",
  },
  "trailing": {**SD15, "timestep_spacing": "trailing"},
}


@live
@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("solver", ["dpm_solver", "ddim", "ddpm"])
@pytest.mark.parametrize("file", FILES)
def test_a_pipelines_file_means_what_its_diffusers_pipeline_makes_of_it(file, solver, xl):
  """Timesteps of each solver, and latents where it adds no noise, after 20 steps."""
  import diffusers
  import torch

  stated = dict(FILES[file])
  if xl:
    stated["clip_sample"] = False  # which SDXL's pipeline does not correct, so it is refused
  kind = getattr(diffusers, stated["_class_name"])
  pipe = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
  nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
  nothing |= (
    dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    if xl
    else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
  )
  theirs = pipe(**nothing, scheduler=kind.from_config(stated)).scheduler
  name = {"dpm_solver": "DPMSolverMultistep", "ddim": "DDIM", "ddpm": "DDPM"}[solver]
  if f"{name}Scheduler" != stated["_class_name"]:
    theirs = getattr(diffusers, f"{name}Scheduler").from_config(theirs.config)
  theirs.set_timesteps(20)

  index = {"_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline"}
  family = (sdxl if xl else stable_diffusion).FAMILY
  configs = family.correct({"model_index": index, "scheduler": stated, "unet": {}}, where="x")
  schedule = schedule_from_config(configs["scheduler"])
  ours = pipeline.Pipeline(Path(), family, configs, {}, {}, (), schedule, "", 0, 512)
  levels = timesteps_lib.uniform_grid(schedule, 20, 1, **ours.spacing(solver))
  np.testing.assert_array_equal(levels.timesteps[:, 0], theirs.timesteps)
  if solver == "ddpm":
    return
  start = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
  denoise = lambda x, t: 0.3 * x  # noqa: E731
  found = jax.jit(lambda x: samplers.sample(denoise, x, levels, schedule, solver=solver))(start)
  x = torch.tensor(start)
  for t in theirs.timesteps:
    x = theirs.step(denoise(x, t), t, x).prev_sample
  np.testing.assert_allclose(found, x.numpy(), rtol=1e-4, atol=1e-4)


def test_what_diffusers_corrects_in_old_files(caplog):
  old = {
    "model_index": {"_class_name": "StableDiffusionPipeline"},
    "scheduler": {"_class_name": "DDIMScheduler", "steps_offset": 0, "clip_sample": True},
    "unet": {"_diffusers_version": "0.6.0", "sample_size": 32},
  }
  correct = stable_diffusion.FAMILY.correct
  new = correct(old, where="model")
  assert new["scheduler"] == {**old["scheduler"], "steps_offset": 1, "clip_sample": False}
  assert new["unet"]["sample_size"] == 64 and old["unet"]["sample_size"] == 32
  said = "model/scheduler/scheduler_config.json: steps_offset is 0, taken as 1"
  assert said in caplog.text and caplog.text.count("taken as") == 3
  later = {"_diffusers_version": "0.9.0.dev0", "sample_size": 32}
  assert correct({**old, "unet": later}, where="x")["unet"] == later
  assert sdxl.FAMILY.correct(old, where="x") == old


def test_offset_grid_is_the_papers():
  schedule = make_schedule()
  offsets = jnp.array([0, 17, 49])
  made = timesteps_lib.offset_grid(schedule, 20, offsets)
  expected = np.arange(950, -1, -50)[:, None] + np.array([0, 17, 49])
  np.testing.assert_array_equal(made.timesteps, expected)
  np.testing.assert_array_equal(made.log_snr[:-1], schedule.log_snr[expected])
  np.testing.assert_array_equal(made.alpha_bar[-1], 1.0)
  # T not a multiple of N: still inside 0..T-1 for every allowed offset.
  ragged = timesteps_lib.offset_grid(schedule, 30, jnp.array([0, 32])).timesteps
  assert ragged.min() == 10
  assert ragged.max() == 999


@pytest.mark.parametrize(
  ("options", "first_and_last"),
  [
    ({"spacing": "leading", "steps_offset": 1}, (941, 48)),  # 1000 // 21 = 47, plus 1
    ({"spacing": "leading", "visit_lowest": True}, (950, 0)),
    ({"spacing": "linspace"}, (999, 50)),
    ({"spacing": "linspace", "visit_lowest": True}, (999, 0)),
    ({"spacing": "trailing"}, (999, 49)),
    ({"karras": True}, (999, 0)),
  ],
)
def test_uniform_grids(options, first_and_last):
  made = timesteps_lib.uniform_grid(make_schedule(), 20, 3, **options)
  assert made.timesteps.shape == (20, 3)
  assert made.timesteps.dtype == jnp.int32
  assert made.log_snr.shape == (21, 3)
  assert (int(made.timesteps[0, 0]), int(made.timesteps[-1, 2])) == first_and_last
  assert np.all(np.diff(made.log_snr, axis=0) > 0)


def test_bad_requests_are_user_errors():
  schedule = make_schedule()
  for steps in (0, 1001):
    with pytest.raises(UserError, match="sampling steps"):
      timesteps_lib.uniform_grid(schedule, steps, 1)
    with pytest.raises(UserError, match="sampling steps"):
      timesteps_lib.offset_grid(schedule, steps, jnp.zeros(1, int))
  with pytest.raises(UserError, match="spacing"):
    timesteps_lib.uniform_grid(schedule, 5, 1, spacing="even")
  with pytest.raises(UserError, match="final"):
    timesteps_lib.uniform_grid(schedule, 5, 1, final="one")
  with pytest.raises(UserError, match="distinct"):
    timesteps_lib.uniform_grid(schedule, 1000, 1, spacing="leading")
  levels, x_T = timesteps_lib.uniform_grid(schedule, 5, 2), jnp.zeros((2, 3))
  for options in ({"solver": "euler"}, {"order": 4}, {"eta": 0.5}):
    with pytest.raises(UserError):
      samplers.sample(_denoise, x_T, levels, schedule, **options)
  with pytest.raises(UserError, match="eta"):
    samplers.sample(_denoise, x_T, levels, schedule, solver="ddim", eta=1.5)
  with pytest.raises(ValueError, match="key"):
    samplers.sample(_denoise, x_T, levels, schedule, solver="ddpm", key=jax.random.key(0))
  with pytest.raises(ValueError, match="batch"):
    samplers.sample(_denoise, x_T[:1], levels, schedule)


@pytest.mark.parametrize(
  ("solver", "order"), [("dpm_solver", 2), ("dpm_solver", 3), ("ddpm", 1)]
)
def test_a_batch_equals_its_samples_alone(solver, order):
  schedule = make_schedule()
  offsets = jnp.array([0, 13, 49])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(3))
  x_T = samplers.initial_noise(keys, ROWS)

  @jax.jit
  def run(x_T, offsets, keys):
    levels = timesteps_lib.offset_grid(schedule, 20, offsets)
    options = {"solver": solver, "order": order, "key": keys, "trajectory": True}
    return samplers.sample(_denoise, x_T, levels, schedule, **options)

  x0, seen = run(x_T, offsets, keys)
  assert np.isfinite(x0).all()
  assert np.abs(x0[0] - x0[1]).max() > 0.01
  for b in range(3):
    one = slice(b, b + 1)
    np.testing.assert_array_equal(samplers.initial_noise(keys[one], ROWS), x_T[one])
    alone, seen_alone = run(x_T[one], offsets[one], keys[one])
    # Another batch size may be other kernels, and third order amplifies their rounding.
    np.testing.assert_allclose(alone, x0[one], atol=2e-5, rtol=1e-6)
    np.testing.assert_allclose(seen_alone.states, seen.states[:, one], atol=2e-5)
    np.testing.assert_array_equal(seen_alone.timesteps, seen.timesteps[:, one])


def test_trajectory_is_what_the_denoiser_saw_and_said():
  schedule = make_schedule()
  levels = timesteps_lib.offset_grid(schedule, 5, jnp.array([3, 150]))
  x_T = golden.start_and_noise("dpm1")[0]
  calls = []

  def spying(x_t, t):
    out = _denoise(x_t, t).astype(jnp.bfloat16)
    jax.debug.callback(lambda *a: calls.append(jax.tree.map(np.array, a)), x_t, t, out)
    return out

  run = jax.jit(functools.partial(samplers.sample, spying), static_argnames="trajectory")
  x0, seen = run(x_T, levels, schedule, trajectory=True)
  jax.effects_barrier()
  assert len(calls) == 5
  calls.sort(key=lambda call: -call[1][0])
  assert seen.predictions.dtype == jnp.bfloat16
  np.testing.assert_array_equal(seen.states[0], x_T)
  for k, (x_t, t, out) in enumerate(calls):
    np.testing.assert_array_equal(seen.states[k], x_t)
    np.testing.assert_array_equal(seen.timesteps[k], t)
    np.testing.assert_array_equal(seen.predictions[k], out)
  plain = run(x_T, levels, schedule)
  np.testing.assert_allclose(plain, x0, atol=1e-6)


def test_without_trajectory_no_states_are_stacked():
  schedule = make_schedule()

  def stacked(trajectory):
    levels = timesteps_lib.uniform_grid(schedule, 7, 2)
    run = functools.partial(samplers.sample, trajectory=trajectory)
    text = str(
      jax.make_jaxpr(lambda x: run(_denoise, x, levels, schedule))(jnp.zeros((2, 5, 3)))
    )
    return "f32[7,2,5,3]" in text

  assert stacked(True)
  assert not stacked(False)


MEAN, STD = 0.7, 0.5


def _gaussian_denoiser(schedule):
  """The exact epsilon prediction for data ~ N(MEAN, STD^2)."""

  def denoise(x_t, t):
    alpha_bar = schedule.alpha_bar[t][:, None]
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return jnp.sqrt(1 - alpha_bar) * (x_t - jnp.sqrt(alpha_bar) * MEAN) / variance

  return denoise


def _gaussian_errors(order):
  """Error against the closed-form flow at t = 39 of 15, 30 and 60 steps."""
  schedule = make_schedule()
  alpha_bar = np.array(schedule.alpha_bar, np.float64)
  start = np.array([-1.5, 0.3, 1.1])

  def flow(t):  # (x - alpha mu) / sqrt(alpha^2 s^2 + sigma^2) never changes
    a = alpha_bar[t]
    return np.sqrt(a) * MEAN + start * np.sqrt(a * STD**2 + 1 - a)

  @jax.jit
  def run(x_T, levels):
    denoise = _gaussian_denoiser(schedule)
    return samplers.sample(denoise, x_T, levels, schedule, order=order)

  errors = []
  for steps in (15, 30, 60):
    t = np.linspace(999, 39, steps + 1).astype(np.int32)[:, None]
    levels = timesteps_lib.Grid(timesteps=jnp.asarray(t[:-1]), log_snr=schedule.log_snr[t])
    x = np.array(run(flow(999)[None], levels)[0], np.float64)
    errors.append(np.abs(x - flow(39)).max())
  return np.array(errors)


def test_order_of_convergence():
  first, second, third = (_gaussian_errors(order) for order in (1, 2, 3))
  slopes = [-np.diff(np.log2(errors)) for errors in (first, second, third)]
  assert np.all(np.abs(slopes[0] - 1.0) < 0.1), slopes
  # Order 2 reaches its slope from below, order 3 from above: its halved quadratic term
  # (see dpm_solver.py) leaves 2.6, then 2.3, and 2 in the end, with a smaller constant.
  assert slopes[1][1] == pytest.approx(1.8, abs=0.15), slopes
  assert np.all(slopes[2] > 2.2), slopes
  assert second[-1] < 0.1 * first[-1]
  assert third[-1] < 0.4 * second[-1]


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("order", "eta"))
def _table(solver, levels, **options):
  return solver.coefficients(levels, **options)


def test_third_order_weights_follow_from_the_integral():
  """For x0(l) linear in l order 3 is exact: here against scipy's quadrature."""
  schedule = make_schedule()
  levels = timesteps_lib.uniform_grid(schedule, 20, 1, spacing="trailing", final="sigma_min")
  data = np.array(_table(dpm_solver, levels, order=3).data[:, :, 0])
  lam = 0.5 * np.array(levels.log_snr[:, 0], np.float64)
  for k in range(2, 20):
    sigma = np.sqrt(1 / (1 + np.exp(2 * lam[k + 1])))
    got = sum(data[k, j] * (0.3 + lam[k - j]) for j in range(3))
    exact = integrate.quad(lambda u: np.exp(u) * (0.3 + u), lam[k], lam[k + 1])[0]
    assert got == pytest.approx(sigma * exact, abs=3e-6)


def test_short_steps_keep_finite_accurate_weights():
  schedule = make_schedule()
  levels = timesteps_lib.uniform_grid(schedule, 1000, 1, spacing="trailing")
  for order in (1, 2, 3):
    table = _table(dpm_solver, levels, order=order)
    assert np.isfinite(table.state).all()
    assert np.isfinite(table.data).all()
    # A constant x0 = c is followed exactly: alpha_t c = state alpha_s c + sum(data) c.
    alpha = np.sqrt(levels.alpha_bar)
    total = table.state * alpha[:-1] + table.data.sum(axis=1)
    np.testing.assert_allclose(total, alpha[1:], atol=2e-5)


def test_ddim_with_eta_1_is_ddpm():
  levels = timesteps_lib.offset_grid(make_schedule(), 20, jnp.array([0, 31]))
  a, b = _table(ddim, levels, eta=1.0), _table(ddpm, levels)
  np.testing.assert_allclose(a.state, b.state, rtol=2e-4, atol=1e-6)
  np.testing.assert_allclose(a.data, b.data, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(a.noise, b.noise, rtol=1e-5)
  assert _table(ddim, levels).noise is None


def test_ddpm_mean_and_variance_in_float64():
  schedule = make_schedule()
  levels = timesteps_lib.uniform_grid(schedule, 50, 1, visit_lowest=True)
  alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
  s = alpha_bar[np.arange(980, -1, -20)]
  t = np.append(s[1:], 1.0)
  beta = 1 - s / t
  table = _table(ddpm, levels)
  np.testing.assert_allclose(
    table.state[:, 0], np.sqrt(1 - beta) * (1 - t) / (1 - s), rtol=2e-5
  )
  np.testing.assert_allclose(table.data[:, 0, 0], np.sqrt(t) * beta / (1 - s), rtol=2e-5)
  np.testing.assert_allclose(table.noise[:, 0] ** 2, (1 - t) / (1 - s) * beta, rtol=2e-5)
  assert table.noise[-1, 0] == 0


def test_step_noise_is_fresh_for_each_step_and_sample():
  keys = jax.random.split(jax.random.key(3), 4)
  draws = [samplers.initial_noise(keys, (50,))]
  draws += [samplers.step_noise(keys, k, (50,)) for k in range(3)]
  draws = np.array(draws).reshape(16, 50)
  correlation = np.abs(np.corrcoef(draws) - np.eye(16)).max()
  assert correlation < 0.6
  assert draws.std() == pytest.approx(1.0, abs=0.1)
