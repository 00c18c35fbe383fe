"""FLOPs of programs, counted from the shapes of their matrix products and convolutions.

A multiplication and its addition count as two FLOPs, as is usual. Other operations, a few per
cent, are left out. Recomputation by `model.remat` is not counted as work of a method.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxpref import base_config
from jaxpref.models import reward_model, step_reward
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.training import pathwise_step, step_rows
from jaxpref.training import rollout as rollout_lib
from jaxpref.training.judge import Judge
from jaxpref.training.latent_judge import LatentJudge
from jaxpref.training.programs import abstract_prompts, has_own_targets
from jaxpref.training.setup import Checked
from jaxpref.training.step_judge import StepJudge


def count(jaxpr: Any) -> float:
  """Counts the FLOPs of a program over all devices.

  Args:
    jaxpr: from `jax.make_jaxpr`. A conditional counts as its most expensive branch. The body
      of a `while`, whose number of iterations is unknown, counts once. Custom kernels, such
      as cuDNN's attention, are opaque and count as 0.
  """
  return sum(map(_count_equation, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def of_forward(pipeline: Pipeline) -> float:
  """Counts the FLOPs of the denoiser's prediction for one latent."""
  cond = pipeline.abstract_cond(1)
  if pipeline.is_improver:
    cond["image"] = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  shapes = tuple((name, leaf.shape) for name, leaf in cond.items())
  make_denoise = pipeline.family.make_denoise
  return _of_forward(make_denoise, pipeline.denoiser, pipeline.latent_shape, shapes)


@functools.cache  # iterations and campaigns repeat the same call
def _of_forward(
  make_denoise: Callable, denoiser: Any, latent_shape: tuple[int, ...], cond_shapes: tuple
) -> float:
  x_t = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.int32)
  cond = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in cond_shapes}
  denoise = make_denoise(denoiser, attention="stock", norm="stock")
  return count(jax.make_jaxpr(denoise)(abstract_params(denoiser), x_t, t, cond))


def of_update(checked: Checked, forward: float) -> dict[str, float]:
  """Counts the FLOPs of one update over all devices.

  A backward pass counts as two forward passes. With LoRA it counts as one, because the frozen
  weights need no gradients. (The first layers need no gradients of their inputs either, which
  would save a few per cent more.)

  Args:
    checked: the run's configuration and models.
    forward: FLOPs of a prediction, from `of_forward`.

  Returns:
    FLOPs by phase: 'policy' and, if the run has them, 'reference', 'old' and 'rollout'. The
    rollout of rounds is shared by their updates; decoding and scorers are not counted. 'judge'
    is a trained reward model's work on candidates, with its decoder if it has one, or, of
    updates that sample, decoder and scorers with their backward pass; what is recomputed counts
    there. Of a step-aware preference model, 'reference' is the work of the frozen denoiser and
    decoder, and 'policy' also counts what is recomputed.
  """
  if "pathwise" in checked.config:
    return _of_pathwise(checked, forward)
  if base_config.judges_images(checked.config):
    return _of_step_reward(checked, forward)
  if checked.loss.needs.judges:
    return _of_reward_model(checked)
  config, needs = checked.config, checked.loss.needs
  rows, states = config.train.batch_size, config.rollout.states if needs.rollout else 1
  arms = 1 if base_config.share_inputs(config) else len(checked.arms)
  trained = arms - has_own_targets(checked)
  passes = 2 if config.lora.rank else 3
  scale_of = checked.pipeline.classifier_free_scale
  if scale_of(step_rows.training_guidance(config)) > 1:
    rows *= 2  # each with and without its prompt
  cost = {"policy": passes * rows * states * trained * forward}
  if needs.rows == "paths":  # the first of two passes over all steps has no gradient
    passes += 1
    rows *= step_rows.plan_steps(config, checked.pipeline).trained
    cost["policy"] = passes * rows * trained * forward
  if needs.reference and not config.data.noise_draws:
    cost["reference"] = rows * states * arms * forward
  if needs.old:
    cost["old"] = rows * arms * forward
  guided = 2 if scale_of(config.rollout.guidance) > 1 else 1
  if online := config.get("rounds"):
    samples = online.num_prompts * online.images_per_prompt / online.updates
    cost["rollout"] = samples * guided * _evaluations(checked) * forward
    if "steps" in config and config.steps.judge:
      judged = config.steps.candidates * base_config.comparisons(config)
      cost["judge"] = samples * judged * _of_trained_judge(checked)
  if needs.rollout:
    chunk = rollout_lib.chunk_size(rows, config.rollout.batch_size, devices=checked.mesh.size)
    cost["rollout"] = (
      rows
      * guided
      * forward
      * expected_steps(rows, config.rollout.num_steps, states=states, chunk=chunk)
    )
  return cost


def _evaluations(checked: Checked) -> int:
  """Counts the predictions for a round's image."""
  config = checked.config
  steps = config.rollout.num_steps
  if not base_config.have_candidates(config):
    return int(steps)
  first = config.steps.first
  # A latent judge compares without predictions, so that only the chosen candidate has one.
  latent = config.steps.judge and not isinstance(checked.judge, StepJudge)
  alone = base_config.comparisons(config) if latent else 1
  # A candidate's prediction judges it, and serves its own step if it is chosen.
  return int(first + alone + config.steps.candidates * (steps - alone - first))


def _of_reward_model(checked: Checked) -> dict[str, float]:
  """Counts the FLOPs of an update of a latent reward model."""
  config, pipeline = checked.config, checked.pipeline
  reward = of_reward(pipeline, width=config.judge.width, guidance=config.judge.guidance)
  return {"policy": 3 * config.train.batch_size * len(checked.arms) * reward}


def _of_step_reward(checked: Checked, forward: float) -> dict[str, float]:
  """Counts the FLOPs of an update of a step-aware preference model."""
  config, pipeline = checked.config, checked.pipeline
  images = config.train.batch_size * len(checked.arms)
  guided = 2 if config.judge.guidance > 1 else 1
  score_images = step_reward.make_score_images(pipeline.scorer)
  score, decode = _of_step_aware(pipeline, pipeline.scorer, score_images)
  return {"policy": images * score, "reference": images * (guided * forward + decode)}


def _of_step_aware(
  pipeline: Pipeline, scorer: Any, score_images: Any, *, learns: bool = True
) -> tuple[float, float]:
  """Counts the FLOPs of a step-aware reward of an image, and those of its decoder.

  Args:
    pipeline: of the VAE.
    scorer: that the model began as.
    score_images: the model's function.
    learns: count the reward's gradient, for which it is computed once more.
  """
  latent = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  vae = pipeline.modules["vae"]
  decode = functools.partial(vae_lib.decode_clipped, vae)
  of_decoder = count(jax.make_jaxpr(decode)(abstract_params(vae), latent))
  image = jax.eval_shape(decode, abstract_params(vae), latent)
  level, ids = jax.ShapeDtypeStruct((1,), jnp.int32), scorer.tokenize([""])
  rate = lambda *given: jax.checkpoint(score_images)(*given).sum()  # noqa: E731
  function = jax.value_and_grad(rate) if learns else rate
  params = step_reward.abstract_params(scorer)
  return count(jax.make_jaxpr(function)(params, image, level, ids)), of_decoder


def _of_trained_judge(checked: Checked) -> float:
  """Counts the FLOPs of a candidate's reward."""
  if isinstance(judge := checked.judge, StepJudge):
    found = checked.pipeline, judge.reward.scorer, judge.score_images
    return sum(_of_step_aware(*found, learns=False))
  pipeline, width, guidance = latent_judge(checked)
  return of_reward(pipeline, width=width, guidance=guidance)


def latent_judge(checked: Checked) -> tuple[Pipeline, int, float]:
  """Returns a latent judge's pipeline, width and guidance; of a plan, the preset's usual."""
  if isinstance(checked.judge, LatentJudge):
    reward = checked.judge.reward
    return reward.pipeline, reward.width, reward.guidance
  usual = base_config.base("latent_reward", checked.config.preset)
  base_config.judge(usual)
  return checked.pipeline, usual.judge.width, usual.judge.guidance


def of_reward(pipeline: Pipeline, *, width: int, guidance: float) -> float:
  """Counts the FLOPs of a latent reward model's reward of one latent."""
  score = reward_model.make_score(pipeline, guidance=guidance, attention="stock", norm="stock")
  params = reward_model.abstract_params(pipeline, width=width)
  latent = jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)
  t, cond = jax.ShapeDtypeStruct((1,), jnp.int32), pipeline.abstract_cond(1)
  return count(jax.make_jaxpr(score)(params, latent, t, cond, cond))


def _of_pathwise(checked: Checked, forward: float) -> dict[str, float]:
  """Counts the FLOPs of an update that samples, by phase."""
  config, path = checked.config, pathwise_step.path_of(checked.config)
  rows, backward = config.train.batch_size, 1 if config.lora.rank else 2
  evaluation = rows * forward * (2 if path.guidance > 1 else 1)
  if path.method == "predicted":  # its prediction is not recomputed
    learned, passes, before = 1, 1 + backward, (path.first + path.end - 1) / 2 + 1
  elif path.method == "renoised":
    learned, passes, before = path.repeats, 2 + backward, path.num_steps
  else:
    learned, passes, before = path.last, 2 + backward, path.num_steps - path.last
  images = rows * (learned if path.method == "renoised" else 1)
  return {
    "policy": learned * passes * evaluation,
    "rollout": before * evaluation,
    "judge": images * _of_judge(checked),
  }


def _of_judge(checked: Checked) -> float:
  """Counts the FLOPs of an image's reward and of its gradient."""
  judge, batch = checked.judge, abstract_prompts(checked, 1)
  assert isinstance(judge, Judge)  # such a run has one
  latents = jax.ShapeDtypeStruct((1, *checked.pipeline.latent_shape), jnp.float32)

  def reward(latents, params, tokens):
    return judge.total(judge.score(params, latents, tokens)).sum()

  arguments = latents, batch["judge"], batch["rows"]["tokens"]
  return count(jax.make_jaxpr(jax.value_and_grad(reward))(*arguments))


def expected_steps(rows: int, num_steps: int, *, states: int, chunk: int) -> float:
  """Returns the expected number of solver steps per row of a rollout.

  A chunk stops at the last state that any of its rows keeps. Rows are sorted by the step of
  their last kept state, so a chunk's number of steps is an order statistic of those steps.

  Args:
    rows: number of rows of an update.
    num_steps: number of solver steps of a whole trajectory.
    states: number of states kept per trajectory, see `rollout.make_rollout`.
    chunk: number of rows per chunk, from `rollout.chunk_size`.
  """
  first, kept = np.arange(num_steps)[:, None], np.arange(states)
  last = ((first + num_steps // states * kept) % num_steps).max(axis=1)
  reached = np.searchsorted(np.sort(last), np.arange(num_steps), side="right") / num_steps
  # The r-th row stops after step k if fewer than r rows stop at step k or before.
  ranks = np.arange(chunk, rows + 1, chunk)[:, None]
  beyond = stats.binom.cdf(ranks - 1, rows, reached)
  return float(1 + beyond.sum(axis=1).mean())


def _count_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2.0 * np.prod(out, dtype=float) * np.prod([left[i] for i in contracted], dtype=float)
  if name == "conv_general_dilated":
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    features = kernel[params["dimension_numbers"].rhs_spec[0]]
    # A strided convolution's gradient dilates its input with zeros, which are not counted.
    holes = np.prod(params["lhs_dilation"], dtype=float)
    return 2.0 * np.prod(out, dtype=float) * np.prod(kernel, dtype=float) / features / holes
  if name == "cond":
    return max(map(count, params["branches"]))
  times = params["length"] if name == "scan" else 1
  if name == "shard_map":
    # The body is the work of one device. JAX versions name the parameter differently.
    axes = params.get("newly_manual_axes") or params.get("manual_axes", ())
    times = np.prod([params["mesh"].shape[axis] for axis in axes])
  return float(times) * sum(map(count, _inner(params)))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for part in value if isinstance(value, tuple | list) else [value]:
      if hasattr(getattr(part, "jaxpr", part), "eqns"):
        yield part
