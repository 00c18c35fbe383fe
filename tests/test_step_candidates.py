"""Candidates of steps: the program's pairs against a loop by hand, and what it refuses."""

import candidates_main
import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from candidates_main import ETA, FIRST, SCALE, STEPS

from jaxpref import rng, sharding
from jaxpref.data import encode
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models import load_pipeline
from jaxpref.models import vae as vae_lib
from jaxpref.training import policy_sampler, rounds, setup, step_candidates, step_rows

SEEDS = np.array([3, 2**31], np.uint32)
CAPTIONS = ["a red circle", "two blue squares"]
CHOSEN = candidates_main.chosen_of(SEEDS)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
  return load_pipeline(str(tiny_pipeline))


@pytest.fixture(scope="module")
def texts(pipeline):
  mesh = sharding.make_mesh()
  return encode.encode_prompts(pipeline, mesh, CAPTIONS), encode.encode_no_prompt(
    pipeline, mesh
  )


def sample(pipeline, texts, count, **options):
  program, placed, tokens = candidates_main.make_program(
    pipeline, sharding.make_mesh(), CAPTIONS, count, **options
  )
  chosen = candidates_main.chosen_of(SEEDS, options.get("steps", STEPS))
  return program(pipeline.params["unet"], placed, *texts, SEEDS, chosen, tokens)


@pytest.fixture(scope="module")
def of_three(pipeline, texts):
  return sample(pipeline, texts, 3)


def test_one_candidate_is_the_plain_sampler(pipeline, texts):
  latents, decoded, steps = sample(pipeline, texts, 1)
  plain = policy_sampler.make_policy_sampler(
    *(pipeline.make_denoise(mesh=sharding.make_mesh()), pipeline),
    **{"solver": "ddim", "order": 1, "num_steps": STEPS, "guidance": SCALE},
  )
  params = pipeline.params["unet"], pipeline.params["vae"]
  want, pictures, alone = plain(*params, *texts, SEEDS, CHOSEN)
  np.testing.assert_allclose(latents, want, atol=1e-4)
  assert np.abs(np.int32(decoded.pixels) - np.int32(pictures.pixels)).max() <= 1
  np.testing.assert_allclose(steps.latents[:, :, :2], alone.latents, atol=1e-4)
  for name, of in alone.labels.items():
    np.testing.assert_array_equal(steps.labels[name], of, err_msg=name)
  assert (steps.labels["better"] == steps.labels["worse"]).all()


CASES = [(1, STEPS, "images"), (2, 7, "images"), (3, 6, "images")]
LEVELS = [(1, STEPS, "levels"), (2, 7, "levels")]


@pytest.mark.parametrize(("apart", "count", "kind"), [*CASES, *LEVELS])
def test_pairs_by_hand(pipeline, texts, of_three, apart, count, kind):
  """A loop over images and steps, with DDIM's equation in float64."""
  latents, _, steps = of_three
  if apart > 1 or kind == "levels":
    latents, _, steps = sample(pipeline, texts, 3, apart=apart, steps=count, kind=kind)
  denoise = jax.jit(pipeline.make_denoise(mesh=sharding.make_mesh()))
  decode = jax.jit(lambda p, z: vae_lib.decode_unit(pipeline.modules["vae"], p, z))
  shape, schedule = pipeline.latent_shape, pipeline.schedule
  grid = sampling.grid_of(pipeline, shape, count, "ddim", 1)
  levels = np.float64(grid.log_snr[:, 0])
  alpha = 1 / (1 + np.exp(-levels))  # share of the signal, in squares

  def clean(x, k, row):
    """Returns the clean latents that the guided prediction implies."""
    t = schedule_lib.timestep_input(schedule, grid.timesteps[k])
    conds = jax.tree.map(lambda c: c[row : row + 1], texts[0]), texts[1]
    params, x_t = pipeline.params["unet"], jnp.float32(x)[None]
    given, empty = (np.float64(denoise(params, x_t, t, cond)[0]) for cond in conds)
    guided = empty + SCALE * (given - empty)
    signal, noise = np.sqrt(alpha[k]), np.sqrt(1 - alpha[k])
    if schedule.prediction_type == "v_prediction":
      return signal * x - noise * guided
    return (x - noise * guided) / signal

  def score(x0, k, row):
    image = decode(pipeline.params["vae"], jnp.float32(x0)[None])
    red = 2 * 255 * np.clip(np.float64(image[0, 0]) * 0.5 + 0.5, 0, 1).mean()
    if kind == "images":
      return red
    t = 0 if k == count else float(grid.timesteps[k, 0])  # of the candidate, not of the step
    return red * (1 + t / 100) + len(CAPTIONS[row])

  def step(x, k, row, key):
    """Returns a step's output, and the deviation of its noise."""
    x0, after = clean(x, k, row), alpha[k + 1]
    eps = (x - np.sqrt(alpha[k]) * x0) / np.sqrt(1 - alpha[k])
    std = ETA * np.sqrt((1 - after) / (1 - alpha[k]) * (1 - alpha[k] / after))
    mean = np.sqrt(after) * x0 + np.sqrt(max(1 - after - std**2, 0.0)) * eps
    return mean + std * np.float64(sampler_lib.step_noise(key[None], k, shape)[0]), std

  for row, seed in enumerate(SEEDS):
    key = rng.key_of(0, "generate", seed)
    keys = [key, *(jax.random.fold_in(key, count + j) for j in (1, 2))]
    x = np.float64(sampler_lib.initial_noise(key[None], shape)[0])
    for k in range(FIRST):
      x, _ = step(x, k, row, key)
    for start in range(FIRST, count, apart):
      end = min(start + apart, count)
      paths, stds = [[x] for _ in keys], []
      for k in range(start, end):
        for path, own in zip(paths, keys, strict=True):
          after, std = step(path[-1], k, row, own)
          path.append(after)
        stds.append(std)
      ends = [path[-1] for path in paths]
      found = [x if end == count else clean(x, end, row) for x in ends]
      scores = np.array([score(x0, end, row) for x0 in found])
      best, worst = paths[scores.argmax()], paths[scores.argmin()]
      for i, k in enumerate(range(start, end)):
        seen = steps.latents[row, k - FIRST]
        inputs = [best[i]] if apart == 1 else [best[i], worst[i]]
        np.testing.assert_allclose(seen[:-2], inputs, atol=2e-4)
        if stds[-1] > 0 or apart > 1:  # without noise all outputs are equal
          np.testing.assert_allclose(seen[-2:], [best[i + 1], worst[i + 1]], atol=2e-4)
        for name, want in (("better", scores.max()), ("worse", scores.min())):
          np.testing.assert_allclose(steps.labels[name][row, k - FIRST], want, rtol=1e-4)
      x = ends[int(step_candidates._choose(key[None], start, 3)[0])]
    np.testing.assert_allclose(latents[row], x, atol=2e-4)


@pytest.mark.parametrize("apart", [1, 2])
def test_latents_are_judged_at_their_own_level(pipeline, texts, of_three, apart):
  """And which candidate goes on does not depend on the judge."""
  latents, _, steps = sample(pipeline, texts, 3, kind="latents", apart=apart)
  if apart == 1:
    np.testing.assert_allclose(latents, of_three[0], atol=1e-4)
    np.testing.assert_allclose(steps.latents[:, :, 0], of_three[2].latents[:, :, 0], atol=1e-4)
  grid = sampling.grid_of(pipeline, pipeline.latent_shape, STEPS, "ddim", 1)
  level = np.append(np.float64(grid.timesteps[FIRST + 1 :, 0]), 0.0)  # images have no noise
  text = np.float64(texts[0]["text"]).mean(axis=(1, 2)) - np.float64(texts[1]["text"]).mean()
  judged = [0, 1, 2] if apart == 1 else [1, 1, 2]  # the step after which each is compared
  for side, name in ((-2, "better"), (-1, "worse")):
    means = np.float64(steps.latents[:, judged, side]).mean(axis=(2, 3, 4))
    want = 3 * (means + text[:, None]) * (1 + level[judged])
    np.testing.assert_allclose(steps.labels[name], want, rtol=1e-4, atol=1e-3)
  assert (steps.labels["better"] > steps.labels["worse"])[:, :-1].all()


@pytest.mark.long
def test_eight_devices_sample_what_one_does(tiny_pipeline):
  """And candidates are judged where they are: no latents are communicated."""
  program = conftest.ROOT / "tests" / "candidates_main.py"
  cases = (8, 1, "images", 1), (2, 4, "images", 2), (2, 4, "latents", 1), (2, 4, "levels", 1)
  for data, fsdp, kind, apart in cases:
    ours = candidates_main.sample(str(tiny_pipeline), data=1, fsdp=1, kind=kind, apart=apart)
    given = str(tiny_pipeline), str(data), str(fsdp), kind, str(apart)
    found = conftest.on_eight_devices(program, *given)
    assert found["devices"] == 8
    for name in ("latents", "better", "worse"):
      np.testing.assert_allclose(found[name], ours[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert max(found["moved"]) == 0


def test_a_pair_below_the_gap_has_equal_scores(pipeline, texts, of_three):
  labels = of_three[2].labels
  apart = np.tanh((labels["better"] - labels["worse"]) / 2)
  gap = float(np.median(apart[apart > 0]))
  some = sample(pipeline, texts, 3, gaps=(gap, gap))[2]
  equal = np.asarray(some.labels["better"] == some.labels["worse"])
  np.testing.assert_array_equal(equal, apart <= gap)
  assert equal.any() and not equal.all()
  np.testing.assert_array_equal(some.labels["worse"], labels["worse"])
  np.testing.assert_array_equal(some.latents, of_three[2].latents)


def test_the_gap_is_linear_in_the_noise(pipeline, of_three):
  grid = sampling.grid_of(pipeline, pipeline.latent_shape, STEPS, "ddim", len(SEEDS))
  table = sampler_lib.coefficients(grid, solver="ddim", eta=ETA)
  picks = CHOSEN[1][:, :-1]  # the last step has no noise, and runs do not train on it
  std = np.float64(of_three[2].labels["std"][0, :-1])
  gaps = 0.2 + 0.5 * (std - std.min()) / (std.max() - std.min())
  for k, gap in enumerate(gaps):  # a pair on either side of each step's gap
    for apart, decided in ((gap - 1e-3, False), (gap + 1e-3, True)):
      zeros = jnp.zeros((STEPS - FIRST, len(SEEDS), 3, *pipeline.latent_shape))
      better = jnp.full((STEPS - FIRST, len(SEEDS)), 2 * np.arctanh(apart))
      seen = zeros, better, jnp.zeros_like(better)
      found = step_candidates._take(
        *(seen, grid, table, pipeline.schedule, picks, FIRST), (0.2, 0.7)
      )
      assert (np.asarray(found.labels["better"][:, k] > 0) == decided).all()


def test_the_random_choice_is_uniform():
  keys = jax.vmap(jax.random.key)(jnp.arange(3000))
  found = step_candidates._choose(keys, 2, 3)
  counts = np.bincount(found, minlength=3)
  assert counts.sum() == 3000 and np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
  assert 0.28 < np.mean(found == step_candidates._choose(keys, 3, 3)) < 0.39  # independent


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("spo", {"steps.candidates": 1}, "choose at least 2"),
    ("spo", {"steps.first": 2}, "one of the 2 steps with noise"),
    ("spo", {"steps.window": 1}, "must be 0 with steps.candidates"),
    ("ppo", {"steps.apart": 2}, "set steps.candidates to 2 or more"),
    ("spo", {"steps.apart": 3}, "more than the 2 steps with noise"),
    ("spo", {"steps.apart": 2, "steps.gap_noisy": 0.1}, "compared together have one gap"),
    ("ppo", {"steps.candidates": 2}, "does not compare outputs of a step"),
    ("spo", {"rounds.scorers": ("shapes.correct",)}, "shapes.correct"),
  ],
)
def test_settings_that_do_not_fit_are_refused(method, changes, message, tiny_pipeline):
  config = runs.config(method, **changes)
  config.model.path = str(tiny_pipeline)
  with pytest.raises(UserError) as error:
    setup.check(config)
  assert message in str(error.value)


def test_a_common_input_is_two_equal_ones(pipeline, texts, of_three):
  """Residuals of a pair from one state, whose prediction is made once, and of two states."""
  flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), of_three[2])
  cond = jax.tree.map(lambda x: np.repeat(x, STEPS - FIRST, axis=0), texts[0])
  denoise = pipeline.make_denoise(mesh=sharding.make_mesh())
  fixed = denoise, pipeline.schedule, SCALE, pipeline.params["unet"], texts[1]
  residuals = jax.jit(lambda rows: step_rows.residuals(*fixed, rows, "wl"))
  found = []
  for inputs in (1, 2):
    labels = {name: np.stack([flat.labels[name]] * inputs, 1) for name in step_rows.LABELS}
    latents = np.concatenate([flat.latents[:, :1]] * inputs + [flat.latents[:, 1:]], axis=1)
    rows = step_rows.make_arms({"latents": latents, "cond": cond, "labels": labels}, "wl")
    found.append(residuals(rows))
  for arm in "wl":
    np.testing.assert_allclose(found[0][arm], found[1][arm], atol=1e-4)
    noise = np.sqrt(np.square(found[0][arm]).mean((1, 2, 3)))
    np.testing.assert_allclose(noise, flat.labels["std"], rtol=0.5, atol=1e-3)


def test_rows_of_candidates_that_went_on_alone():
  """Each step's inputs and outputs, the better first, and its labels for both inputs."""
  images, count = 2, 3
  latents = np.arange(images * count * 4, dtype=np.float32).reshape(images, count, 4, 1, 1, 1)
  numbers = np.arange(images * count, dtype=np.float32).reshape(images, count)
  labels = {name: numbers + i for i, name in enumerate((*step_rows.LABELS, "better", "worse"))}
  group, advantage = np.arange(images), np.array([5.0, 6.0])
  rows = rounds.make_rows(
    *("step_pairs", latents[:, 0, 0], {"advantage": advantage}, group, advantage),
    step_rows.Steps(latents, labels),
  )
  assert rows["latents"].ravel().tolist() == list(range(24))
  assert rows["group"].tolist() == [0, 0, 0, 1, 1, 1]
  flat = numbers.ravel()
  for i, name in enumerate(step_rows.LABELS):
    np.testing.assert_array_equal(rows["labels"][name], np.stack([flat + i] * 2, axis=1))
  sides = np.stack([flat + len(step_rows.LABELS), flat + len(step_rows.LABELS) + 1], axis=1)
  np.testing.assert_array_equal(rows["labels"]["reward"], sides)
  np.testing.assert_array_equal(
    rows["labels"]["advantage"], np.repeat([[5.0], [6.0]], 3, axis=0) * [1, 1]
  )
