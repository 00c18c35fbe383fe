"""Samples of the policy whose steps have several candidates, which a judge compares.

From one state the policy samples K candidates, which go on alone for one step or a few. Each is
then judged by its own prediction of the clean image, decoded and scored (SPO), by scorers or by
a model that also reads the level, or as it is by a latent reward model (LPO). The steps of the
best and of the worst become rows; a random one is the state where the next candidates begin, so
that rows of later steps do not depend on the judge's choice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpref import rng, sharding
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.evaluation import sampling
from jaxpref.models import vae as vae_lib
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline
from jaxpref.rewards import likelihood
from jaxpref.training import step_rows
from jaxpref.training.judge import Judge
from jaxpref.training.latent_judge import LatentJudge
from jaxpref.training.step_judge import StepJudge

_CHOICE = 0x43414E44  # purpose of random numbers


def make_candidate_sampler(
  denoise: Denoise,
  pipeline: Pipeline,
  judge: Judge | LatentJudge | StepJudge,
  *,
  mesh: Mesh,
  solver: str,
  num_steps: int,
  guidance: float,
  candidates: int,
  first: int,
  apart: int,
  gaps: tuple[float, float],
) -> Callable[..., tuple[jax.Array, vae_lib.Decoded, step_rows.Steps]]:
  """Makes the jitted program that samples images and the pairs of steps on their way.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    pipeline: the schedule, the VAE's module, and the solver's usual timesteps.
    judge: scores predicted clean latents, or noised ones.
    mesh: of the devices, each of which judges the candidates of its own images.
    solver: a stochastic one of order 1, see `step_rows.SOLVERS`.
    num_steps: N, number of solver steps.
    guidance: classifier-free guidance scale; at most 1: no guidance.
    candidates: K, samples from one state.
    first: first step with candidates.
    apart: steps that candidates take before they are compared; the last ones may take fewer.
    gaps: least difference of the best and the worst candidate's probabilities, the softmax of
      their two scores, at the trained steps with the least and the most noise; in between it
      is linear in the noise's deviation. Pairs with a smaller one get equal scores.

  Returns:
    `sample(params, judge_params, cond, uncond, seeds, chosen, tokens) -> (latents
    [B, C, h, w], Decoded, Steps)`. `judge_params` and `tokens` are those of the judge, and the
    other arguments those of `policy_sampler.make_policy_sampler`. Steps have the inputs and
    the outputs of the best and the worst candidate, [B, S, 4, C, h, w], or, if `apart` is 1,
    their common input and both outputs; and their scores as the labels `better` and `worse`.
  """
  shape, schedule = pipeline.latent_shape, pipeline.schedule
  score_each, reads_noise = _make_score(judge, mesh), isinstance(judge, LatentJudge)

  @jax.jit
  def sample(params, judge_params, cond, uncond, seeds, chosen, tokens):
    eta, picks, starts = chosen
    keys, begins = (
      jax.vmap(lambda s: rng.key_of(0, "generate", s))(of) for of in (seeds, starts)
    )
    grid = sampling.grid_of(pipeline, shape, num_steps, solver, len(seeds))
    table = sampler_lib.coefficients(grid, solver=solver, eta=eta)

    def predict(x_t, k):
      many = lambda x: jnp.repeat(x, x_t.shape[1], axis=0)  # noqa: E731
      of = functools.partial(denoise, params), jax.tree.map(many, cond), uncond, guidance
      guided, levels = guidance_lib.classifier_free(*of), (grid.timesteps[k], grid.log_snr[k])
      return _predict_clean(guided, schedule, x_t, *map(many, levels))

    def predict_one(x_t, k):
      return predict(x_t[:, None], k)[:, 0]

    def score(latents, t):
      return score_each(judge_params, latents, t, cond, tokens)

    def plain(x_t, k):
      before = x_t[:, None], predict_one(x_t, k)[:, None]
      return _draw(grid, table, keys, k, *before)[:, 0], None

    branch = functools.partial(
      _branch, predict, functools.partial(_draw, grid, table, keys), candidates
    )

    def branched(carry, start):
      path = branch(*carry, start, apart)
      outputs, end = path[1][-1], start + apart
      taken = _choose(keys, start, candidates)
      after = step_rows.pick_own(outputs, taken)
      t = schedule_lib.timestep_input(schedule, grid.timesteps[end])
      if reads_noise:
        scores, x0 = score(outputs, t), predict_one(after, end)
      else:
        found = predict(outputs, end)
        scores, x0 = score(found, t), step_rows.pick_own(found, taken)
      return (after, x0), _ends(*path, scores, common=apart == 1)

    x_t, _ = jax.lax.scan(plain, sampler_lib.initial_noise(begins, shape), jnp.arange(first))
    carry = x_t, predict_one(x_t, first)
    *starts, last = range(first, num_steps, apart)
    carry, seen = jax.lax.scan(branched, carry, jnp.array(starts, int))
    # The last outputs are the images themselves, without noise.
    path = branch(*carry, last, num_steps - last)
    scores = score(path[1][-1], jnp.zeros_like(grid.timesteps[0]))
    latents = step_rows.pick_own(path[1][-1], _choose(keys, last, candidates))
    seen = jax.tree.map(
      lambda of, end: jnp.concatenate([of.reshape(last - first, *of.shape[2:]), end]),
      *(seen, _ends(*path, scores, common=apart == 1)),
    )
    steps = _take(seen, grid, table, schedule, picks, first, gaps)
    return latents, vae_lib.decode(pipeline.modules["vae"], judge_params["vae"], latents), steps

  return sample


def _predict_clean(
  denoise: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: schedule_lib.Schedule,
  x_t: jax.Array,
  timesteps: jax.Array,
  log_snr: jax.Array,
) -> jax.Array:
  """Predicts clean latents in one call, [B, K, C, h, w], of latents at levels [B K]."""
  flat = x_t.reshape(-1, *x_t.shape[2:])
  prediction = denoise(flat, schedule_lib.timestep_input(schedule, timesteps))
  x0, _ = schedule_lib.split_at(schedule.prediction_type, prediction, flat, log_snr)
  return x0.reshape(x_t.shape)


def _make_score(judge: Judge | LatentJudge | StepJudge, mesh: Mesh) -> Callable[..., jax.Array]:
  """Makes (the judge's parameters, latents [B, K, ...], t [B], cond, tokens) -> scores [B, K].

  The latents are clean ones, or noised to the levels t for a latent judge.
  """

  def flat(latents: jax.Array, *of_samples: Any) -> tuple[Any, ...]:
    many = jax.tree.map(lambda x: jnp.repeat(x, latents.shape[1], axis=0), of_samples)
    return latents.reshape(-1, *latents.shape[2:]), *many

  if isinstance(judge, LatentJudge):
    return (
      lambda params, x_t, t, cond, tokens: judge.score(  # noqa: ARG005
        params, *flat(x_t, t, cond)
      ).reshape(x_t.shape[:2])
    )
  rows = P(sharding.BATCH_AXES)

  def one(params, x0, t, tokens):
    if isinstance(judge, StepJudge):
      return judge.score(params, x0, t, tokens)
    return judge.total(judge.score(params, x0, tokens))

  # Without it, every device would decode all images, one by one.
  score_own = jax.shard_map(
    one, mesh=mesh, in_specs=(P(), rows, rows, rows), out_specs=rows, check_vma=False
  )

  def score(params, x0, t, cond, tokens):  # noqa: ARG001
    return score_own(params, *flat(x0, t, tokens)).reshape(x0.shape[:2])

  return score


def _draw(
  grid: Grid, table: Coefficients, keys: jax.Array, k: Any, x_t: jax.Array, x0: jax.Array
) -> jax.Array:
  """Samples outputs of step k of inputs and their predicted clean latents, [B, K, C, h, w].

  The first has the plain sampler's noise.
  """
  step = jax.tree.map(lambda of: of[k], table)
  mean, std = jax.vmap(likelihood.step_moments, (None, 1, 1), (1, None))(step, x_t, x0)
  each = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  noise = [sampler_lib.step_noise(keys, k, x_t.shape[2:])]
  for j in range(1, x_t.shape[1]):
    noise.append(sampler_lib.step_noise(each(keys, grid.num_steps + j), k, x_t.shape[2:]))
  return mean + schedule_lib.per_sample(std, mean) * jnp.stack(noise, axis=1)


def _branch(
  predict: Callable,
  sample: Callable,
  candidates: int,
  x_t: jax.Array,
  x0: jax.Array,
  start: Any,
  count: int,
) -> tuple[jax.Array, jax.Array]:
  """Samples `count` steps of candidates from `start` on.

  Args:
    predict: (inputs, number of the step) -> predicted clean latents.
    sample: (number of the step, inputs, their predicted clean latents) -> outputs.
    candidates: K.
    x_t: where they begin, [B, C, h, w].
    x0: the predicted clean latents there.
    start: number of the first step.
    count: of steps.

  Returns:
    Inputs and outputs, [count, B, K, C, h, w].
  """
  x_t, x0 = (jnp.repeat(x[:, None], candidates, axis=1) for x in (x_t, x0))
  after = sample(start, x_t, x0)
  begin = x_t[None], after[None]
  if count == 1:
    return begin

  def go_on(x_t, k):
    after = sample(k, x_t, predict(x_t, k))
    return after, (x_t, after)

  _, rest = jax.lax.scan(go_on, after, start + jnp.arange(1, count))
  return jax.tree.map(lambda *of: jnp.concatenate(of), begin, rest)


def _choose(keys: jax.Array, k: jax.Array, count: int) -> jax.Array:
  """Returns the number of the candidate that is the next input, int32 [B]."""

  def one(key):
    chosen = jax.random.fold_in(jax.random.fold_in(key, _CHOICE), k)
    return jax.random.randint(chosen, (), 0, count)

  return jax.vmap(one)(keys)


def _ends(
  inputs: jax.Array, outputs: jax.Array, scores: jax.Array, *, common: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the steps of the best and of the worst candidate, and their scores.

  Args:
    inputs: of L steps, [L, B, K, C, h, w].
    outputs: of these steps.
    scores: of the candidates, [B, K].
    common: whether all inputs are equal.

  Returns:
    Latents [L, B, 3 or 4, C, h, w], see `make_candidate_sampler`, and both scores, [L, B].
  """
  ends = scores.argmax(axis=1), scores.argmin(axis=1)
  of_step = jax.vmap(step_rows.pick_own, in_axes=(0, None))
  before, after = ([of_step(x, end) for end in ends] for x in (inputs, outputs))
  better, worse = (
    jnp.repeat(step_rows.pick_own(scores, end)[None], len(inputs), axis=0) for end in ends
  )
  return jnp.stack([*before[: 1 if common else 2], *after], axis=2), better, worse


def _take(
  seen: tuple[jax.Array, ...],
  grid: Grid,
  table: Coefficients,
  schedule: schedule_lib.Schedule,
  picks: jax.Array,
  first: int,
  gaps: tuple[float, float],
) -> step_rows.Steps:
  """Takes the steps with numbers `picks`, [B, S], out of those from `first` on."""
  latents, better, worse = (step_rows.pick_own(x.swapaxes(0, 1), picks - first) for x in seen)
  labels = step_rows.labels_at(grid, table, schedule, picks)
  lowest, highest = (f(labels["std"], axis=1, keepdims=True) for f in (jnp.min, jnp.max))
  share = (labels["std"] - lowest) / jnp.maximum(highest - lowest, 1e-12)
  # softmax of two scores: the difference of its entries is tanh of half their difference.
  decided = jnp.tanh((better - worse) / 2) > gaps[0] + (gaps[1] - gaps[0]) * share
  labels |= {"better": jnp.where(decided, better, worse), "worse": worse}
  return step_rows.Steps(latents, labels)
