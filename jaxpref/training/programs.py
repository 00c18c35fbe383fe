"""A run's jitted programs, made from its configuration: to train, plan or measure.

These functions only build programs: they read no files, and every array may be a
ShapeDtypeStruct.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxpref import base_config, sharding
from jaxpref.data import rows as rows_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.models import denoiser
from jaxpref.models import lora as lora_lib
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.training import batch as batch_lib
from jaxpref.training import (
  judge_settings,
  pathwise_step,
  policy_sampler,
  step_candidates,
  step_rows,
)
from jaxpref.training import optimizer as optimizer_lib
from jaxpref.training import rollout as rollout_lib
from jaxpref.training import train_step as train_step_lib
from jaxpref.training.judge import Judge
from jaxpref.training.setup import Checked, abstract_trained, list_size


class Programs(NamedTuple):
  """The programs of a run.

  Attributes:
    adapt: (trained parameters, base) -> the policy's parameters.
    make_state: initial trained parameters -> a `train_step.TrainState`.
    placement: the sharding of each of the state's leaves.
    train_step: see `train_step.make_train_step`.
    rollout: see `rollout.make_rollout`; None if the loss has no rollout.
    sample: see `policy_sampler.make_policy_sampler` and, of a run with candidates,
      `step_candidates.make_candidate_sampler`; None if the run has no rounds.
    reference_errors: see `train_step.make_reference_errors`.
    lagging: whether the run has a `TrainState.policy_copy`, which a rollout uses.
  """

  adapt: Callable[[Any, Any], Any]
  make_state: Callable[[Any], train_step_lib.TrainState]
  placement: Any
  train_step: Callable
  rollout: Callable | None
  sample: Callable | None
  reference_errors: Callable
  lagging: bool


def make_programs(checked: Checked, trained: Any, uncond: Any) -> Programs:
  """Makes the programs of a run.

  Args:
    checked: the run's configuration and models.
    trained: initial trained parameters, arrays or shapes.
    uncond: conditioning of the dropped prompt, arrays or shapes.
  """
  config, pipeline, mesh = checked.config, checked.pipeline, checked.mesh
  needs = checked.loss.needs
  learning_rate, adapt = _make_learning_rate(config), _make_adapt(config, pipeline)
  tx = _make_optimizer(config, learning_rate)
  lagging = train_step_lib.needs_copy(needs, config.rollout.refresh_every)
  buffer = _replay_shapes(checked, uncond)

  def make_state(trained):
    replay = None
    if buffer is not None:
      replay = rollout_lib.init_replay(buffer, config.rollout.replay)
    return train_step_lib.init_state(
      trained, tx, seed=config.seed, lagging_copy=lagging, replay=replay
    )

  shapes = jax.eval_shape(make_state, trained)
  placement = sharding.params_sharding(mesh, shapes)
  if mesh.shape["fsdp"] > 1:
    sharding.list_unsharded(shapes, placement)
  kernels = {
    "attention": config.model.attention,
    "norm": config.model.norm,
    "remat": config.model.remat,
    "mesh": mesh,
  }
  make_denoise = functools.partial(pipeline.make_denoise, **kernels)
  trained_function: Callable = make_denoise(guidance=config.model.guidance)
  if needs.judges:
    trained_function = judge_settings.make_score(config, pipeline, **kernels)
  sampled = make_denoise(guidance=config.rollout.guidance)
  guidance = pipeline.classifier_free_scale(config.rollout.guidance)
  dropout = config.data.prompt_dropout
  online = config.get("rounds")
  of_all = {
    "mesh": mesh,
    "state_sharding": placement,
    "learning_rate": learning_rate,
    "ema_decay": config.optim.ema_decay,
    "accumulate": config.train.accumulate,
    "adapt": adapt,
  }
  train_step = train_step_lib.make_train_step(
    *(trained_function, checked.schedule, checked.loss, tx),
    **of_all,
    arms=checked.arms,
    refresh_every=online.updates if online else config.rollout.refresh_every,
    copy_decay=_make_copy_decay(online) if needs.old else None,
    own_targets=has_own_targets(checked),
    guidance=pipeline.classifier_free_scale(step_rows.training_guidance(config)),
    space=config.loss.space,
    prompt_dropout=dropout,
  )
  if "pathwise" in config:
    assert isinstance(checked.judge, Judge)  # such a run has one
    path = pathwise_step.path_of(config)
    train_step = pathwise_step.make_pathwise_step(
      *(trained_function, pipeline, checked.judge, checked.loss, tx, path), **of_all
    )
  rollout = None
  if needs.rollout:
    rollout = rollout_lib.make_rollout(
      *(sampled, checked.schedule),
      mesh=mesh,
      latent_shape=pipeline.latent_shape,
      num_steps=config.rollout.num_steps,
      solver=config.rollout.solver,
      order=config.rollout.order,
      guidance=guidance,
      states_per_trajectory=config.rollout.states,
      batch_size=config.rollout.batch_size,
      prompt_dropout=dropout,
    )
  reference_errors = train_step_lib.make_reference_errors(
    *(trained_function, checked.schedule, checked.loss),
    arms=checked.arms,
    prompt_dropout=dropout,
    space=config.loss.space,
  )
  sample = _make_sampler(checked, sampled) if online else None
  return Programs(
    *(adapt, make_state, placement, train_step, rollout, sample, reference_errors, lagging)
  )


def _make_sampler(checked: Checked, denoise: denoiser.Denoise) -> Callable:
  """Makes the program that samples the images of a round."""
  config, pipeline = checked.config, checked.pipeline
  options = {
    "solver": config.rollout.solver,
    "num_steps": config.rollout.num_steps,
    "guidance": pipeline.classifier_free_scale(config.rollout.guidance),
  }
  if not checked.judge:
    return policy_sampler.make_policy_sampler(
      denoise, pipeline, **options, order=config.rollout.order
    )
  return step_candidates.make_candidate_sampler(
    *(denoise, pipeline, checked.judge),
    **options,
    mesh=checked.mesh,
    candidates=config.steps.candidates,
    first=config.steps.first,
    apart=config.steps.apart,
    gaps=(config.steps.gap, config.steps.gap_noisy or config.steps.gap),
  )


def rollout_arguments(
  program: Programs, state: Any, base: Any, cond: Any, uncond: Any, guide: Any = None
) -> tuple:
  """Returns the arguments of `program.rollout`, arrays or shapes."""
  policy = state.policy_copy if program.lagging else state.params
  return program.adapt(policy, base), state.seed, state.update, cond, uncond, guide


class Arguments(NamedTuple):
  """Arguments of `Programs.train_step`, as shapes with shardings."""

  state: Any
  base: Any
  uncond: Any
  batch: Any
  rollout: Any
  start: Any
  guide: Any


def abstract_rows(checked: Checked, count: int) -> dict[str, Any]:
  """Returns the shapes of `count` encoded rows, see `encode.encode_rows`."""
  pipeline, needs = checked.pipeline, checked.loss.needs
  images = len(rows_lib.arms_of(needs.rows, list_size(checked.config)))
  shape: tuple[int, ...] = (count, images)
  if needs.of_steps:
    shape = (*_shape_of_steps(checked, count), 2)  # a step's input and output
    if needs.rows == "step_pairs":
      shape = (count, _shape_of_steps(checked, count)[1] + 2)  # inputs and two outputs
  latents = jax.ShapeDtypeStruct((*shape, *pipeline.latent_shape), jnp.float32)
  return {
    "latents": latents,
    **({"std": latents} if checked.config.data.latents == "sample" else {}),
    "cond": pipeline.abstract_cond(count),
    "labels": _abstract_labels(checked, count, images),
  }


def _shape_of_steps(checked: Checked, count: int) -> tuple[int, ...]:
  """Returns the shape of the labels of the steps of `count` rows.

  [B], of pairs [B, 2], with a common input [B, 1], and of paths [B, 2, S].
  """
  kind = checked.loss.needs.rows
  if kind == "steps":
    return (count,)
  if kind == "step_pairs":
    return (count, 1 if base_config.share_inputs(checked.config) else 2)
  return (count, 2, step_rows.plan_steps(checked.config, checked.pipeline).trained)


def _abstract_labels(checked: Checked, count: int, images: int) -> dict[str, Any]:
  needs = checked.loss.needs
  if not needs.scored:
    return {"desirable": jax.ShapeDtypeStruct((count,), bool)}
  more = checked.loss.label(np.zeros(1)) if checked.loss.label else {}
  shape = (count, images) if needs.several else (count,)
  names = ("advantage", "reward", *more)
  found = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.float32))
  if needs.of_steps:
    found |= step_rows.abstract_labels(_shape_of_steps(checked, count), checked.schedule)
  return found


def abstract_programs(checked: Checked) -> tuple[Programs, Arguments]:
  """Makes a run's programs and the arguments of its train step from shapes only."""
  config, mesh, needs = checked.config, checked.mesh, checked.loss.needs
  count = config.train.batch_size
  trained = abstract_trained(config, checked.pipeline)
  batch, uncond = abstract_rows(checked, count), abstract_rows(checked, 1)["cond"]
  program = make_programs(checked, trained, uncond)
  frozen_dtype = config.model.frozen_dtype
  freeze = lambda params: checked.pipeline.freeze(params, frozen_dtype)  # noqa: E731
  base = jax.eval_shape(freeze, checked.pipeline.abstract_denoiser())
  if base_config.judges_images(config):
    base = {"denoiser": base, "vae": abstract_params(checked.pipeline.modules["vae"])}
  if config.data.noise_draws:
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
    error = jax.ShapeDtypeStruct((count,), jnp.float32)
    batch |= {"row": numbers, "draw": numbers}
    batch |= {"ref": dict.fromkeys(checked.arms, error) if needs.reference else {}}
  state = jax.eval_shape(program.make_state, trained)
  drawn = start = None
  if program.rollout:
    drawn = _abstract_states(checked)
  if checked.reference == "start":
    start = trained if config.lora.rank else jax.eval_shape(freeze, trained)
  kept = kept_base(checked, base)
  scale = checked.pipeline.classifier_free_scale(step_rows.training_guidance(config))
  guide = uncond if scale > 1 else None
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  placed_batch = _placed(batch, jax.tree.map(lambda _: rows, batch))
  if "pathwise" in config:
    placed_batch = abstract_prompts(checked, count)
  return program, Arguments(
    state=_placed(state, program.placement),
    base=_placed(kept, _placement_of_base(checked, kept)),
    uncond=_placed(uncond, jax.tree.map(lambda _: whole, uncond)),
    batch=placed_batch,
    rollout=_placed(drawn, jax.tree.map(lambda _: rows, drawn)),
    start=_placed(start, sharding.params_sharding(mesh, start)),
    guide=_placed(guide, jax.tree.map(lambda _: whole, guide)),
  )


def _placement_of_base(checked: Checked, kept: Any) -> Any:
  """Returns where `kept_base` is: as parameters are, but a decoder whole on every device."""
  where = sharding.params_sharding(checked.mesh, kept)
  if not base_config.judges_images(checked.config):
    return where
  whole = sharding.replicated(checked.mesh)
  return {**where, "vae": jax.tree.map(lambda _: whole, kept["vae"])}


def abstract_prompts(checked: Checked, count: int) -> dict[str, Any]:
  """Returns the batch of an update that samples, as `prompt_batches` makes it."""
  mesh, pipeline, judge = checked.mesh, checked.pipeline, checked.judge
  assert isinstance(judge, Judge)  # such a run has one
  of_rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  shapes = lambda tree: jax.tree.map(  # noqa: E731
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree
  )
  rows = {
    "cond": pipeline.abstract_cond(count),
    "tokens": shapes(judge.tokenize([""] * count)),
    "seed": jax.ShapeDtypeStruct((count,), jnp.uint32),
  }
  params = judge.abstract_params()
  guide = pipeline.abstract_cond(1) if checked.config.rollout.guidance > 1 else None
  return {
    "rows": _placed(rows, jax.tree.map(lambda _: of_rows, rows)),
    "judge": _placed(params, jax.tree.map(lambda _: whole, params)),
    "guide": _placed(guide, jax.tree.map(lambda _: whole, guide)),
  }


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def kept_base(checked: Checked, base: Any) -> Any:
  """Returns the part of the base's parameters that `adapt` or the reference needs, or None."""
  config = checked.config
  if config.lora.rank or checked.reference == "base" or base_config.judges_images(config):
    return base
  fixed = checked.pipeline.family.fixed
  return denoiser.split_fixed(base, fixed)[1] if fixed else None


def has_own_targets(checked: Checked) -> bool:
  """Tells whether a rollout's targets are the policy's predictions, with error 0."""
  rollout, trained_at = checked.config.rollout, checked.config.model.guidance
  takes_it = checked.pipeline.takes_guidance
  as_trained = rollout.guidance == trained_at if takes_it else rollout.guidance <= 1
  fresh = rollout.refresh_every == 1 and as_trained and not rollout.replay
  return bool(checked.loss.needs.rollout) and fresh


def _make_adapt(config: ConfigDict, pipeline: Pipeline) -> Callable[[Any, Any], Any]:
  fixed = pipeline.family.fixed
  if base_config.judges_images(config):
    return lambda trained, base: {"trained": trained, **base}
  if not config.lora.rank and fixed:
    return lambda trained, base: denoiser.join_fixed(trained, base, fixed)
  if not config.lora.rank:
    return lambda trained, base: trained
  scale = config.lora.alpha / config.lora.rank
  return lambda trained, base: lora_lib.Adapted(base, trained, scale)


def _make_learning_rate(config: ConfigDict) -> optax.Schedule:
  return optimizer_lib.make_schedule(
    config.optim.schedule,
    lr=config.optim.lr,
    warmup_updates=config.optim.warmup_updates,
    num_updates=config.train.num_updates,
  )


def _make_copy_decay(online: Any) -> optax.Schedule:
  """Returns the share of itself that the lagging average keeps, by the updates done."""
  rate, start, limit = online.old_rate, online.old_start, online.old_decay
  return lambda done: jnp.clip(rate * (done - start), 0.0, limit)


def _make_optimizer(
  config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  optimizer = config.optim
  return optimizer_lib.make_optimizer(
    learning_rate,
    b1=optimizer.b1,
    b2=optimizer.b2,
    eps=optimizer.eps,
    weight_decay=optimizer.weight_decay,
    clip_norm=optimizer.clip_norm,
  )


def _replay_shapes(checked: Checked, uncond: Any) -> Any:
  """Returns the shapes of an update's noised rows if the run has a replay buffer."""
  config = checked.config
  if not config.rollout.replay:
    return None
  batch = abstract_rows(checked, config.train.batch_size)
  drawn = _abstract_states(checked)
  return jax.eval_shape(
    lambda *a: batch_lib.make_arms(
      checked.schedule, checked.loss.needs, *a, seed=0, update=0, prompt_dropout=0.0
    ),
    *(batch, drawn, uncond),
  )


def _abstract_states(checked: Checked) -> rollout_lib.States:
  """Returns the shapes of an update's rollout."""
  config, latent_shape = checked.config, checked.pipeline.latent_shape
  shape = config.train.batch_size, config.rollout.states
  x_t = jax.ShapeDtypeStruct((*shape, *latent_shape), jnp.float32)
  target = jax.ShapeDtypeStruct(x_t.shape, config.model.dtype)
  t = jax.ShapeDtypeStruct(shape, schedule_lib.level_dtype(checked.schedule))
  return jax.eval_shape(rollout_lib.States, x_t, target, t)
