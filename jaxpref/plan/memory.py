"""Memory of a run on a device, from shapes alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import base_config, sharding
from jaxpref.models import reward_model, step_reward
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline, abstract_params
from jaxpref.training import flops
from jaxpref.training.judge import Judge
from jaxpref.training.setup import Checked
from jaxpref.training.step_judge import StepJudge


def bytes_on_device(tree: Any, mesh: Any) -> int:
  """Computes the bytes per device of a tree of shapes that is sharded as parameters are."""
  placed = sharding.params_sharding(mesh, tree)
  sizes = jax.tree.map(
    lambda leaf, where: int(np.prod(where.shard_shape(leaf.shape))) * leaf.dtype.itemsize,
    *(tree, placed),
  )
  return sum(jax.tree.leaves(sizes))


def tree_bytes(tree: Any) -> int:
  """Computes the bytes of a tree of shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def judge_shapes(checked: Checked) -> tuple[Any, Any]:
  """Returns the shapes of what judges the samples of a run.

  Args:
    checked: the run.

  Returns:
    What every device holds whole, and what is sharded as parameters are; empty trees if the
    run has no judge.
  """
  config, pipeline, judge = checked.config, checked.pipeline, checked.judge
  if "pathwise" not in config and not base_config.have_candidates(config):
    return {}, {}
  if isinstance(judge, Judge | StepJudge):
    return judge.abstract_params(), {}
  whole = {"vae": abstract_params(pipeline.modules["vae"])}
  of, width, _ = flops.latent_judge(checked)
  model = reward_model.abstract_params(of, width=width)
  freeze = lambda encoder: pipeline.freeze(encoder, config.model.frozen_dtype)  # noqa: E731
  return whole, {**model, "encoder": jax.eval_shape(freeze, model["encoder"])}


def kept_bytes(pipeline: Pipeline, **options: Any) -> int:
  """Computes the bytes that a denoiser's forward pass stores for the backward pass, per latent.

  Args:
    pipeline: its parameters are not needed.
    **options: `attention`, `norm` and `remat` of `Family.make_denoise`.
  """
  cond = pipeline.abstract_cond(1)
  if pipeline.is_improver:
    cond |= {"image": _latent(pipeline)}
  arguments = _latent(pipeline), _LEVEL, cond
  return _kept(pipeline.make_denoise(**options), pipeline.abstract_denoiser(), *arguments)


def kept_by_reward_model(pipeline: Pipeline, *, width: int, **options: Any) -> int:
  """Computes those of a latent reward model without guidance, per latent.

  Args:
    pipeline: of the denoiser whose first half it is.
    width: of the space in which features and prompts are compared.
    **options: as for `kept_bytes`.
  """
  score = reward_model.make_score(pipeline, guidance=1.0, **options)
  params = reward_model.abstract_params(pipeline, width=width)
  return _kept(score, params, _latent(pipeline), _LEVEL, pipeline.abstract_cond(1), None)


def kept_by_step_reward(pipeline: Pipeline) -> tuple[int, int]:
  """Computes those of a step-aware preference model, whose backward pass recomputes it.

  Args:
    pipeline: with a scorer.

  Returns:
    Bytes per image that are kept of a batch, and those of an image that is recomputed.
  """
  scorer, vae = pipeline.scorer, pipeline.modules["vae"]
  decode = functools.partial(vae_lib.decode_clipped, vae)
  image = jax.eval_shape(decode, abstract_params(vae), _latent(pipeline))
  ids = pipeline.abstract_cond(1)["tokens"]
  params = step_reward.abstract_params(scorer)
  score = step_reward.make_score_images(scorer)
  return tree_bytes((image, ids)), _kept(score, params, image, _LEVEL, ids)


def kept_by_judge(judge: Judge, pipeline: Pipeline, tokens: Any) -> int:
  """Computes those of the decoder and the scorers of an update that samples, per image.

  Args:
    judge: only its parameters' shapes matter.
    pipeline: of the policy.
    tokens: shapes of the tokens of one prompt or more, [B, ...].
  """
  params = judge.abstract_params()
  latent = jax.ShapeDtypeStruct(pipeline.latent_shape, jnp.float32)
  words = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tokens)
  score = lambda x, p, w: judge.score_one(p, x, w)  # noqa: E731  # the gradient is the latent's
  return _kept(score, latent, params, words, shared=params)


_LEVEL = jax.ShapeDtypeStruct((1,), jnp.int32)


def _latent(pipeline: Pipeline) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, *pipeline.latent_shape), jnp.float32)


def _kept(function: Callable, wanted: Any, *arguments: Any, shared: Any = None) -> int:
  """Computes the bytes stored for the gradient of a function's first argument.

  Args:
    function: (wanted, *arguments) -> result.
    wanted: shapes of the argument.
    *arguments: shapes of the others.
    shared: shapes of further parameters.
  """
  residuals = jax.eval_shape(
    lambda of, *rest: jax.vjp(lambda of: function(of, *rest), of)[1], wanted, *arguments
  )
  # Residuals with a parameter's shape are parameters or their casts, which all rows share.
  weights = {leaf.shape for leaf in jax.tree.leaves((wanted, shared))}
  return tree_bytes([x for x in jax.tree.leaves(residuals) if x.shape not in weights])
