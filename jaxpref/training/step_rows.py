"""Rows that are single steps of the policy's own stochastic trajectories.

A row has a step's input, its output, and the step's coefficients from the solver's own table,
so that the train step knows neither the solver nor its grid. The residual of a row is the
output less the mean that a model gives the step: for the model that has sampled, it is the
step's noise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxpref.base_config import FLOW_STEPS
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import sampler as sampler_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.diffusion.timesteps import Coefficients, Grid
from jaxpref.errors import UserError
from jaxpref.evaluation import sampling
from jaxpref.models.denoiser import Denoise
from jaxpref.models.pipeline import Pipeline
from jaxpref.rewards import likelihood
from jaxpref.training.batch import Arms

SOLVERS = ("ddim", *FLOW_STEPS)  # whose noise has a strength for each step
# Labels of a row besides those of its image; see `take`.
LABELS = ("t", "log_snr", "state", "data", "std", "gain", "length")
_WINDOW, _STEPS = 0x57494E44, 0x53544550  # purposes of random numbers


class Plan(NamedTuple):
  """How many steps a trajectory has.

  Attributes:
    steps: of the solver.
    noisy: the first steps, which may have noise: all, or all but one to a clean image.
    window: consecutive steps that have noise in a round.
    trained: steps among these that become rows.
    skipped: first steps of the window that never become rows.
  """

  steps: int
  noisy: int
  window: int
  trained: int
  skipped: int = 0


@flax.struct.dataclass
class Steps:
  """S steps of each of B trajectories.

  Attributes:
    latents: inputs and outputs, float32 [B, S, 2, C, h, w]; of candidates [B, S, 3 or 4, C, h,
      w], see `step_candidates`.
    labels: `LABELS` of the steps, [B, S] each, and further ones of candidates.
  """

  latents: jax.Array
  labels: dict[str, jax.Array]


def plan_steps(config: ConfigDict, pipeline: Pipeline) -> Plan:
  """Counts the steps of a run's trajectories.

  Args:
    config: of the run.
    pipeline: its schedule and spacing of timesteps.

  Raises:
    UserError: the solver has no noise of a chosen strength, or fewer steps than asked for.
  """
  rollout, steps = config.rollout, config.steps
  if rollout.solver not in SOLVERS:
    raise UserError(
      f"rollout.solver = {rollout.solver!r} has no noise of a chosen strength: loss "
      f"{config.loss.name!r} needs ddim or, for flow-matching models, {', '.join(FLOW_STEPS)}"
    )
  sampler_lib.check_solver(pipeline.schedule, rollout.solver)
  if rollout.solver in ("ddim", "cps") and steps.eta > 1:
    raise UserError(f"steps.eta must be at most 1 for {rollout.solver} (got {steps.eta:g})")
  grid = sampling.grid_of(pipeline, pipeline.latent_shape, rollout.num_steps, rollout.solver, 1)
  table = sampler_lib.coefficients(grid, solver=rollout.solver, eta=1.0)
  noisy = int(np.sum(np.asarray(table.noise) > 0))
  if steps.judge and not steps.candidates:
    raise UserError("steps.judge compares candidates: set steps.candidates to 2 or more")
  if steps.apart > 1 and not steps.candidates:
    raise UserError("steps.apart is about candidates: set steps.candidates to 2 or more")
  if steps.candidates:
    _check_candidates(config, noisy)
    return Plan(rollout.num_steps, noisy, noisy, noisy - steps.first, skipped=steps.first)
  window = steps.window or noisy
  trained = steps.trained or window
  if not trained <= window <= noisy:
    raise UserError(
      f"steps.trained = {steps.trained} of steps.window = {steps.window} steps cannot be "
      f"chosen: {noisy} of the {rollout.num_steps} steps of {rollout.solver} have noise"
    )
  return Plan(rollout.num_steps, noisy, window, trained)


def _check_candidates(config: ConfigDict, noisy: int) -> None:
  """Refuses settings of the section `steps` that do not fit candidates.

  Args:
    config: of the run.
    noisy: number of the steps with noise.

  Raises:
    UserError: there is nothing to compare, or other settings choose steps, too.
  """
  steps = config.steps
  if steps.candidates < 2 or steps.first >= noisy:
    raise UserError(
      f"steps.candidates = {steps.candidates} from steps.first = {steps.first} on leave "
      f"nothing to compare: choose at least 2, and one of the {noisy} steps with noise"
    )
  if steps.apart > noisy - steps.first:
    raise UserError(
      f"steps.apart = {steps.apart} is more than the {noisy - steps.first} steps with noise "
      "from steps.first on"
    )
  if steps.apart > 1 and steps.gap_noisy:
    raise UserError(
      "steps.gap_noisy must be 0 with steps.apart above 1: steps that are compared together "
      "have one gap"
    )
  if steps.window or steps.trained:
    raise UserError(
      "steps.window and steps.trained must be 0 with steps.candidates: all steps from "
      "steps.first on have candidates, and are trained"
    )


def check(config: ConfigDict, pipeline: Pipeline, kind: str) -> Plan:
  """Refuses settings of the section `steps` that do not fit others; returns `plan_steps`.

  Args:
    config: of the run.
    pipeline: its base.
    kind: of the rows, 'steps', 'step_pairs' or 'paths'.

  Raises:
    UserError: they do not fit.
  """
  plan, name = plan_steps(config, pipeline), config.loss.name
  if config.data.prompt_dropout:
    raise UserError(
      f"data.prompt_dropout must be 0: loss {name!r} trains the steps that its prompts sampled"
    )
  if (
    schedule_lib.error_scale(pipeline.schedule, config.loss.space, jnp.zeros(1, int))
    is not None
  ):
    raise UserError(f"loss.space must be 'model': loss {name!r} has no errors of predictions")
  if config.noise.density != "uniform" or config.noise.shift:
    raise UserError(
      f"the section noise has no effect: loss {name!r} trains its sampler's levels"
    )
  if config.rounds.old_decay and config.rounds.sampler == "policy":
    raise UserError(
      f"rounds.old_decay must be 0 unless rounds.sampler = 'old': loss {name!r} compares the "
      "policy with the one that has sampled, not with an average"
    )
  if config.steps.candidates and kind != "step_pairs":
    raise UserError(
      f"steps.candidates must be 0: loss {name!r} does not compare outputs of a step"
    )
  if not (kind == "steps" or config.steps.candidates) and config.rounds.images_per_prompt % 2:
    raise UserError(
      f"rounds.images_per_prompt must be even: loss {name!r} learns from pairs of a prompt's "
      f"images (got {config.rounds.images_per_prompt})"
    )
  if kind == "paths":
    if plan.trained < plan.noisy:
      raise UserError(
        f"steps.window and steps.trained must be 0: loss {name!r} learns from whole "
        "trajectories"
      )
    return plan
  if config.train.batch_size % plan.trained and not config.steps.candidates:
    raise UserError(
      f"train.batch_size must be a multiple of the {plan.trained} steps that each image is "
      f"trained on (got {config.train.batch_size})"
    )
  return plan


def etas(config: ConfigDict, plan: Plan, number: int) -> tuple[np.ndarray, int]:
  """Returns the strength of each step's noise in a round, float32 [N], and the window's start.

  Args:
    config: of the run. `steps.hold` is the number of rounds between moves of the window.
    plan: from `plan_steps`.
    number: of the round.
  """
  last = plan.noisy - plan.window
  if config.steps.hold:
    start = number // config.steps.hold % (last + 1)
  else:
    rng = np.random.default_rng([config.seed, number, _WINDOW])
    start = int(rng.integers(min(last, plan.noisy // 2) + 1))
  found = np.zeros(plan.steps, np.float32)
  found[start : start + plan.window] = config.steps.eta
  return found, start


def pick(plan: Plan, start: int, rows: int, seed: Sequence[int]) -> np.ndarray:
  """Chooses the trained steps of each trajectory within the window, int32 [rows, S]."""
  if plan.trained == plan.window - plan.skipped:
    inside = np.broadcast_to(np.arange(plan.skipped, plan.window), (rows, plan.trained))
  else:
    order = np.random.default_rng([*seed, _STEPS]).random((rows, plan.window)).argsort(axis=1)
    inside = np.sort(order[:, : plan.trained], axis=1)
  return (start + inside).astype(np.int32)


def start_seeds(config: ConfigDict, seed: np.ndarray) -> np.ndarray:
  """Returns the seeds of the noise that a round's images start from, [P G]."""
  images = config.rounds.images_per_prompt
  return seed[::images].repeat(images) if config.steps.common_start else seed


def take(
  states: jax.Array,
  x0: jax.Array,
  grid: Grid,
  table: Coefficients,
  schedule: schedule_lib.Schedule,
  picks: jax.Array,
) -> Steps:
  """Takes steps out of trajectories.

  Args:
    states: inputs of N steps, [N, B, C, h, w].
    x0: output of the last one, [B, C, h, w].
    grid: of the trajectories.
    table: the solver's coefficients, of order 1 and with noise.
    schedule: how predictions are read.
    picks: numbers of the steps, int [B, S].
  """
  after = jnp.concatenate([states[1:], x0[None]])
  latents = [pick_own(x.swapaxes(0, 1), picks) for x in (states, after)]
  return Steps(jnp.stack(latents, axis=2), labels_at(grid, table, schedule, picks))


def pick_own(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns x[b, index[b]] for each b, without communication between devices."""
  return jax.vmap(lambda one, i: one[i])(x, index)


def labels_at(
  grid: Grid, table: Coefficients, schedule: schedule_lib.Schedule, picks: jax.Array
) -> dict[str, jax.Array]:
  """Returns `LABELS` of steps, [B, S] each; the arguments are those of `take`.

  The labels of a step are its level `t` and `log_snr`, its coefficients `state` and `data`, the
  deviation `std` of its noise, its `gain` (how much its mean changes with the prediction), and
  its `length` (how much the amplitude of the noise falls).
  """
  chosen = lambda of: jnp.take_along_axis(of.T, picks, axis=1)  # noqa: E731
  assert table.noise is not None  # of a stochastic solver
  _, levels = schedule_lib.scales(grid.log_snr, is_flow=grid.is_flow)
  log_snr, data = chosen(grid.log_snr[:-1]), chosen(table.data[:, 0])
  of_one, _ = schedule_lib.split_at(
    schedule.prediction_type, jnp.ones_like(log_snr), jnp.zeros_like(log_snr), log_snr
  )
  return {
    "t": chosen(grid.timesteps),
    "log_snr": log_snr,
    "state": chosen(table.state),
    "data": data,
    "std": chosen(table.noise),
    "gain": jnp.abs(data * of_one),
    "length": chosen(levels[:-1] - levels[1:]),
  }


def make_arms(batch: Any, arms: Sequence[str]) -> Arms:
  """Makes the train step's rows of a batch; a step's output is the target.

  Args:
    batch: 'latents' [R, I + A, C, h, w], the I inputs and the A outputs of a row's steps, whose
      input is one for all (I = 1) or their own (I = A); 'cond', a tree of [R, ...]; and
      'labels', those of the steps with one entry for each input.
    arms: names of a row's steps, A.
  """
  latents, labels, inputs = batch["latents"], batch["labels"], -len(arms)
  return Arms(latents[:, :inputs], latents[:, inputs:], labels["t"], batch["cond"], labels, {})


def residuals(
  denoise: Denoise,
  schedule: schedule_lib.Schedule,
  guidance: float,
  params: Any,
  guide: Any,
  rows: Arms,
  arms: Sequence[str],
) -> dict[str, jax.Array]:
  """Computes the steps' outputs less a model's means by arm, float32 [R, C, h, w] each.

  All inputs go through the denoiser in one call, and one that the arms share only once.

  Args:
    denoise: (params, x_t, t, cond) -> prediction.
    schedule: how predictions are read.
    guidance: scale of the guidance that is part of the policy; at most 1: none.
    params: of the model.
    guide: conditioning that guidance leads away from, a tree of [1, ...], or None.
    rows: from `make_arms`.
    arms: names of a row's steps.
  """
  count = rows.x_t.shape[1]
  labels = {name: rows.labels[name].reshape(-1) for name in LABELS}
  x_t = rows.x_t.reshape(-1, *rows.x_t.shape[2:])
  guided = guidance_lib.classifier_free(
    lambda x, t, c: denoise(params, x, t, c),
    *(jax.tree.map(lambda c: jnp.repeat(c, count, axis=0), rows.cond), guide, guidance),
  )
  prediction = guided(x_t, schedule_lib.timestep_input(schedule, labels["t"]))
  x0, _ = schedule_lib.split_at(schedule.prediction_type, prediction, x_t, labels["log_snr"])
  step = Coefficients(labels["state"], labels["data"][None], labels["std"])
  mean, _ = likelihood.step_moments(step, x_t, x0)
  by_arm = rows.target - mean.reshape(rows.x_t.shape)
  return {arm: by_arm[:, k] for k, arm in enumerate(arms)}


def abstract_labels(
  shape: tuple[int, ...], schedule: schedule_lib.Schedule
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of `LABELS` of a batch."""
  found = dict.fromkeys(LABELS, jax.ShapeDtypeStruct(shape, jnp.float32))
  level = jax.ShapeDtypeStruct(shape, schedule_lib.level_dtype(schedule))
  return found | {"t": level}


def training_guidance(config: ConfigDict) -> float:
  """Returns the guidance scale of trained predictions or rewards; at most 1: no guidance."""
  if "judge" in config:
    return config.judge.guidance
  guided = "steps" in config and config.steps.guided and config.rollout.guidance > 1
  return config.rollout.guidance if guided else 1.0
