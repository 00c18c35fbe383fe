"""Samples of the policy whose steps have several candidates, which a judge compares.

At each step the policy samples K outputs from one state. Each is judged by its own prediction
of the clean image, decoded and scored (SPO), or as it is by a latent reward model (LPO). The
best and the worst become a row; a random one is the next step's input, so that rows of later
steps do not depend on the judge's choice.
"""

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

_CHOICE = 0x43414E44  # purpose of random numbers


def make_candidate_sampler(
  denoise: Denoise,
  pipeline: Pipeline,
  judge: Judge | LatentJudge,
  *,
  mesh: Mesh,
  solver: str,
  num_steps: int,
  guidance: float,
  candidates: int,
  first: int,
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
    candidates: K, outputs of a step.
    first: first step with candidates.
    gaps: least difference of the best and the worst candidate's probabilities, the softmax of
      their two scores, at the trained steps with the least and the most noise; in between it
      is linear in the noise's deviation. Pairs with a smaller one get equal scores.

  Returns:
    `sample(params, judge_params, cond, uncond, seeds, chosen, tokens) -> (latents
    [B, C, h, w], Decoded, Steps)`. `judge_params` and `tokens` are those of the judge, and the
    other arguments those of `policy_sampler.make_policy_sampler`. Steps have an input and two
    outputs, the best and the worst, [B, S, 3, C, h, w], and the further labels `better` and
    `worse`, their scores.
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
      """Predicts clean latents [B, K, C, h, w] of inputs of step k, in one call."""
      many = lambda x: jnp.repeat(x, x_t.shape[1], axis=0)  # noqa: E731
      guided = guidance_lib.classifier_free(
        lambda x, t, c: denoise(params, x, t, c), jax.tree.map(many, cond), uncond, guidance
      )
      t = schedule_lib.timestep_input(schedule, many(grid.timesteps[k]))
      flat = x_t.reshape(-1, *shape)
      of = schedule.prediction_type, guided(flat, t), flat, many(grid.log_snr[k])
      return schedule_lib.split_at(*of)[0].reshape(x_t.shape)

    def predict_one(x_t, k):
      return predict(x_t[:, None], k)[:, 0]

    def score(latents, t):
      return score_each(judge_params, latents, t, cond, tokens)

    def plain(x_t, k):
      outputs = _draw(grid, table, keys, k, x_t, predict_one(x_t, k), 1)
      return outputs[:, 0], None

    def branched(carry, k):
      x_t, x0 = carry
      outputs = _draw(grid, table, keys, k, x_t, x0, candidates)
      taken = _choose(keys, k, candidates)
      after = step_rows.pick_own(outputs, taken)
      t = schedule_lib.timestep_input(schedule, grid.timesteps[k + 1])
      if reads_noise:
        scores, x0 = score(outputs, t), predict_one(after, k + 1)
      else:
        found = predict(outputs, k + 1)
        scores, x0 = score(found, t), step_rows.pick_own(found, taken)
      return (after, x0), (x_t, *_ends(outputs, scores))

    x_t = sampler_lib.initial_noise(begins, shape)
    x_t, _ = jax.lax.scan(plain, x_t, jnp.arange(first))
    last = num_steps - 1
    carry = x_t, predict_one(x_t, first)
    (x_t, x0), seen = jax.lax.scan(branched, carry, jnp.arange(first, last))
    # The last step's outputs are the images themselves, without noise.
    outputs = _draw(grid, table, keys, last, x_t, x0, candidates)
    ends = x_t, *_ends(outputs, score(outputs, jnp.zeros_like(grid.timesteps[0])))
    latents = step_rows.pick_own(outputs, _choose(keys, last, candidates))
    seen = jax.tree.map(lambda of, end: jnp.concatenate([of, end[None]]), seen, ends)
    steps = _take(seen, grid, table, schedule, picks, first, gaps)
    return latents, vae_lib.decode(pipeline.modules["vae"], judge_params["vae"], latents), steps

  return sample


def _make_score(judge: Judge | LatentJudge, mesh: Mesh) -> Callable[..., jax.Array]:
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
  # Without it, every device would decode all images, one by one.
  score_own = jax.shard_map(
    judge.score, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False
  )

  def score(params, x0, t, cond, tokens):  # noqa: ARG001
    return judge.total(score_own(params, *flat(x0, tokens))).reshape(x0.shape[:2])

  return score


def _draw(
  grid: Grid,
  table: Coefficients,
  keys: jax.Array,
  k: jax.Array,
  x_t: jax.Array,
  x0: jax.Array,
  count: int,
) -> jax.Array:
  """Samples outputs of step k, [B, count, C, h, w]; the first has the plain sampler's noise."""
  step = likelihood.step_at(table, jnp.full(x_t.shape[0], k))
  mean, std = likelihood.step_moments(step, x_t, x0)
  each = jax.vmap(jax.random.fold_in, in_axes=(0, None))
  noise = [sampler_lib.step_noise(keys, k, x_t.shape[1:])]
  for j in range(1, count):
    noise.append(sampler_lib.step_noise(each(keys, grid.num_steps + j), k, x_t.shape[1:]))
  return mean[:, None] + schedule_lib.per_sample(std, mean)[:, None] * jnp.stack(noise, axis=1)


def _choose(keys: jax.Array, k: jax.Array, count: int) -> jax.Array:
  """Returns the number of the candidate that is the next input, int32 [B]."""

  def one(key):
    chosen = jax.random.fold_in(jax.random.fold_in(key, _CHOICE), k)
    return jax.random.randint(chosen, (), 0, count)

  return jax.vmap(one)(keys)


def _ends(outputs: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the best and the worst of outputs [B, K, ...], and their scores."""
  best, worst = scores.argmax(axis=1), scores.argmin(axis=1)
  return (
    step_rows.pick_own(outputs, best),
    step_rows.pick_own(outputs, worst),
    step_rows.pick_own(scores, best),
    step_rows.pick_own(scores, worst),
  )


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
  x_t, best, worst, better, worse = (
    step_rows.pick_own(x.swapaxes(0, 1), picks - first) for x in seen
  )
  labels = step_rows.labels_at(grid, table, schedule, picks)
  lowest, highest = (f(labels["std"], axis=1, keepdims=True) for f in (jnp.min, jnp.max))
  share = (labels["std"] - lowest) / jnp.maximum(highest - lowest, 1e-12)
  # softmax of two scores: the difference of its entries is tanh of half their difference.
  decided = jnp.tanh((better - worse) / 2) > gaps[0] + (gaps[1] - gaps[0]) * share
  labels |= {"better": jnp.where(decided, better, worse), "worse": worse}
  return step_rows.Steps(jnp.stack([x_t, best, worst], axis=2), labels)
