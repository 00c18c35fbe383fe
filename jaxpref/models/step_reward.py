"""A step-aware preference model: a scorer whose image tower is also given a noise level.

SPO: Liang et al., 2024, https://arxiv.org/abs/2406.04314. A scorer of clean images is wrong
about predictions of the clean image at high noise. Here every block of its image tower is
shifted, scaled and gated by vectors that a small network computes of the level t, and all of it
is trained further on predictions. At the start the vectors change nothing: the model is the
scorer at every level. They are added by a flax interceptor, so that the scorer's parameters
keep their names.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from transformers.models.clip.modeling_flax_clip import FlaxCLIPEncoderLayer

from jaxpref import sharding
from jaxpref.diffusion import guidance as guidance_lib
from jaxpref.diffusion import schedule as schedule_lib
from jaxpref.errors import UserError
from jaxpref.models import preference_towers
from jaxpref.models import vae as vae_lib
from jaxpref.models.interceptors import Interceptor
from jaxpref.models.pipeline import Pipeline
from jaxpref.models.reward_model import Score

_FREQUENCIES, _LONGEST_PERIOD = 128, 10_000.0  # of the embedding of t, as in DiT
_STD = 0.02  # of the initial weights of its network
_SIZE = 64  # of the images with which a scorer's blocks are found; any will do


class Scorer(Protocol):
  """Describes the parts of a `scorers.Reward` that are needed here."""

  @property
  def params(self) -> Any:
    """Its parameters, or their shapes."""

  @property
  def tokenize(self) -> Callable[[Any], Any]:
    """Maps N prompts to token ids, int32 [N, L]."""

  @property
  def score(self) -> Callable[[Any, Any, Any], Any]:
    """Maps (params, images [N, H, W, 3] in [0, 1], token ids) to scores, float32 [N]."""


class Vector(NamedTuple):
  """A vector that changes what a module computes.

  Attributes:
    path: of the module.
    kind: 'shift' or 'scale' of its output, or 'gate', a factor of its output.
    width: number of channels.
  """

  path: tuple[str, ...]
  kind: str
  width: int


# (trained, images float [B, H, W, 3] in [0, 1], t [B], token ids [B, L]) -> scores [B].
ScoreImages = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def find_blocks(scorer: Scorer) -> dict[str, tuple[Vector, ...]]:
  """Finds the blocks of a scorer's image tower, and the vectors of each.

  Args:
    scorer: with the image tower of a CLIP model or of `preference_towers`.

  Raises:
    UserError: its image tower is of another kind.
  """
  found: dict[str, tuple[Vector, ...]] = {}

  def note(next_fun, args, kwargs, context):
    if context.method_name == "__call__" and (of := _vectors_of(context.module, args)):
      found["_".join(context.module.path) or "tower"] = of
    return next_fun(*args, **kwargs)

  image = jax.ShapeDtypeStruct((1, _SIZE, _SIZE, 3), jnp.float32)
  with nn.intercept_methods(note):
    ids = scorer.tokenize([""])
    jax.eval_shape(lambda p, x: scorer.score(p, x, ids), scorer.params, image)
  if not found:
    raise UserError(
      "judge.scorer must have the image tower of CLIP or of shapes.preference, whose blocks "
      "can be given a noise level: choose shapes.preference, pickscore.v1 or hpsv2.v2_1"
    )
  return found


def without_params(scorer: Any) -> Any:
  """Returns a `scorers.Reward` with its parameters' shapes instead of the parameters."""
  return scorer._replace(params=jax.eval_shape(lambda params: params, scorer.params))


def init_params(scorer: Scorer, params: Any, key: jax.Array) -> dict[str, Any]:
  """Makes the trained parameters of a model that is the scorer at every level.

  Args:
    scorer: its start; of its parameters only the shapes are read.
    params: the scorer's parameters.
    key: for the network of the levels.

  Returns:
    'model', the scorer's parameters, and 'time', those of the levels: 'in' and 'out' of the
    network, whose width is that of the widest vector, and 'blocks', a layer for each block.
    All are float32.
  """
  blocks = find_blocks(scorer)
  width = max(v.width for vectors in blocks.values() for v in vectors)
  keys = jax.random.split(key)
  time = {
    name: {"kernel": _STD * jax.random.normal(k, (size, width)), "bias": jnp.zeros(width)}
    for name, k, size in zip(("in", "out"), keys, (2 * _FREQUENCIES, width), strict=True)
  }
  layers = {
    name: {
      "kernel": jnp.zeros((width, sum(v.width for v in vectors))),
      "bias": jnp.concatenate([jnp.full(v.width, float(v.kind == "gate")) for v in vectors]),
    }
    for name, vectors in blocks.items()
  }
  model = jax.tree.map(lambda x: x.astype(jnp.float32, copy=False), params)
  return {"model": model, "time": {**time, "blocks": layers}}


def abstract_params(scorer: Scorer) -> Any:
  """Returns the shapes of `init_params`."""
  init = functools.partial(init_params, scorer)
  return jax.eval_shape(init, scorer.params, jax.random.key(0))


def embed_levels(time: Any, t: jax.Array) -> jax.Array:
  """Computes the embedding of levels, float32 [B, width].

  Args:
    time: parameters 'in' and 'out', see `init_params`.
    t: levels as the denoiser is given them, [B].
  """
  rates = jnp.exp(-math.log(_LONGEST_PERIOD) * jnp.arange(_FREQUENCIES) / _FREQUENCIES)
  angles = t.astype(jnp.float32)[:, None] * rates
  waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
  return _dense(time["out"], nn.silu(_dense(time["in"], waves)))


def make_score_images(scorer: Scorer) -> ScoreImages:
  """Makes the function of images that scores them at a level each, see `ScoreImages`."""
  blocks = find_blocks(scorer)

  def score(trained, images, t, ids):
    hidden = nn.silu(embed_levels(trained["time"], t))
    changes: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for name, vectors in blocks.items():
      values, start = _dense(trained["time"]["blocks"][name], hidden), 0
      for path, kind, width in vectors:
        changes.setdefault(path, {})[kind] = values[:, start : start + width]
        start += width
    with nn.intercept_methods(_change_modules(changes)):
      return scorer.score(trained["model"], images, ids)

  return score


def make_score_latents(
  score_images: ScoreImages, vae: Any, *, at_once: int, mesh: Mesh | None = None
) -> Callable[..., jax.Array]:
  """Makes the function that decodes and scores clean latents, each device its own rows.

  The decoder has no gradient. The backward pass recomputes the scorer, `at_once` images at a
  time, so that only the images are kept of a batch. A scorer that recomputes its own layers
  (CLIP's) computes them once more, so that the memory of `at_once` images is small too.

  Args:
    score_images: from `make_score_images`.
    vae: the module that decodes.
    at_once: images that a device decodes and scores at once.
    mesh: that rows are sharded over; None for one device.

  Returns:
    `(trained, VAE's parameters, latents [B, C, h, w], t [B], token ids [B, L]) -> [B]`.
  """

  def of_device(trained, decoder, x0, t, ids):
    def decode(latent):
      return vae_lib.decode_clipped(vae, decoder, latent[None])[0]

    @jax.checkpoint
    def rate(row):
      return score_images(trained, *jax.tree.map(lambda x: x[None], row))[0]

    images = jax.lax.stop_gradient(jax.lax.map(decode, x0, batch_size=at_once))
    return jax.lax.map(rate, (images, t, ids), batch_size=at_once)

  if mesh is None:
    return of_device

  def score(*given):
    current = sharding.current_mesh(mesh)
    if not (axes := sharding.auto_axes(current)):  # inside of `jax.shard_map` over all of them
      return of_device(*given)
    # Otherwise every device would decode all images.
    rows = P(axes)
    own = jax.shard_map(
      of_device,
      mesh=current,
      in_specs=(P(), P(), rows, rows, rows),
      out_specs=rows,
      axis_names=set(axes),
      check_vma=False,
    )
    return own(*given)

  return score


def make_score(
  pipeline: Pipeline, *, guidance: float, at_once: int, mesh: Mesh | None = None, **kernels: Any
) -> Score:
  """Makes the reward of noised latents: predicted, decoded, and scored at their level.

  Args:
    pipeline: of the frozen denoiser and VAE, with a scorer.
    guidance: scale of the prediction's guidance; at most 1: none.
    at_once: see `make_score_latents`.
    mesh: that rows and parameters are sharded over.
    **kernels: further options of `Pipeline.make_denoise`.

  Returns:
    `score`, see `Score`. Its parameters are 'trained', of `init_params`, 'denoiser' and 'vae',
    of which only the first have a gradient. Conditionings have the scorer's token ids.
  """
  denoise = pipeline.make_denoise(mesh=mesh, **kernels)
  rate = make_score_latents(
    *(make_score_images(pipeline.scorer), pipeline.modules["vae"]), at_once=at_once, mesh=mesh
  )

  def score(params, x_t, t, cond, uncond):
    if guidance > 1:  # sizes are not guided
      uncond = {**uncond, **{name: cond[name] for name in ("time_ids",) if name in cond}}
    of_prompt = functools.partial(denoise, jax.lax.stop_gradient(params["denoiser"]))
    guided = guidance_lib.classifier_free(of_prompt, cond, uncond, guidance)
    x0, _ = schedule_lib.split_prediction(pipeline.schedule, guided(x_t, t), x_t, t)
    x0, decoder = jax.lax.stop_gradient((x0, params["vae"]))
    return rate(params["trained"], decoder, x0, t, cond["tokens"])

  return score


def _vectors_of(module: nn.Module, args: tuple) -> tuple[Vector, ...]:
  """Returns the vectors of a block of an image tower; none of other modules."""
  path = module.path
  if path[:1] == ("vision_model",):
    if isinstance(module, FlaxCLIPEncoderLayer):
      width = module.config.hidden_size
      return _normed(path, 1, "self_attn", width) + _normed(path, 2, "mlp", width)
    if path[1:] == ("post_layernorm",):  # of the pooled token
      return _modulated(path, args[0].shape[-1])
  if isinstance(module, preference_towers.Residual):
    return (
      *_modulated((*path, "norm_1"), args[0].shape[-1]),
      *_modulated((*path, "norm_2"), module.channels),
      Vector((*path, "conv_2"), "gate", module.channels),
    )
  if isinstance(module, preference_towers.ImageTower):
    width = module.channels[-1]
    return (
      *_modulated((*path, "norm_1"), width),
      # Not of the attention itself, whose class calls its parent's, so that it would be twice.
      Vector((*path, "attention", "out"), "gate", width),
      *_modulated((*path, "norm_2"), width),
      Vector((*path, "fc_2"), "gate", width),
      *_modulated((*path, "norm_3"), width),
    )
  return ()


def _normed(path: tuple[str, ...], number: int, branch: str, width: int) -> tuple[Vector, ...]:
  """Returns the vectors of a branch of CLIP's layers: of its normalisation, and its gate."""
  gate = Vector((*path, branch), "gate", width)
  return *_modulated((*path, f"layer_norm{number}"), width), gate


def _modulated(path: tuple[str, ...], width: int) -> tuple[Vector, Vector]:
  return Vector(path, "shift", width), Vector(path, "scale", width)


def _change_modules(changes: Mapping[tuple[str, ...], Mapping[str, jax.Array]]) -> Interceptor:
  """Returns the interceptor that applies vectors [B, C] to outputs of modules."""

  def intercept(next_fun, args, kwargs, context):
    bound = context.method_name == "__call__" and context.module.scope is not None
    own = changes.get(context.module.path) if bound else None
    if own is None:
      return next_fun(*args, **kwargs)
    out = next_fun(*args, **kwargs)
    if "scale" in own:
      out = _modulate(out, own["scale"], own["shift"])
    if "gate" in own:
      first, *rest = out if isinstance(out, tuple) else (out,)
      first = first * _over_places(own["gate"], first)
      out = (first, *rest) if isinstance(out, tuple) else first
    return out

  return intercept


def _modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
  return x * _over_places(1 + scale, x) + _over_places(shift, x)


def _over_places(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Returns a vector [B, C] as [B, 1, ..., C], in the dtype of [B, ..., C]."""
  shape = (vector.shape[0], *(1,) * (like.ndim - 2), vector.shape[1])
  return vector.reshape(shape).astype(like.dtype)


def _dense(layer: Any, x: jax.Array) -> jax.Array:
  return jnp.matmul(x, layer["kernel"], precision="highest") + layer["bias"]
