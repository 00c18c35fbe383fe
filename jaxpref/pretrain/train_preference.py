"""The loss and the update of the shapes world's preference model."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpref.models import preference_towers
from jaxpref.models.preference_towers import Towers
from jaxpref.pretrain import fit


def init_params(towers: Towers, key: jax.Array, *, encoder: Any) -> dict[str, Any]:
  """Initializes what is trained: the towers, and the scale of CLIP's loss, as in CLIP."""
  return {
    "towers": preference_towers.init_towers(towers, key, encoder=encoder),
    "contrast_scale": jnp.log(jnp.float32(1 / 0.07)),
  }


def preference_loss(
  towers: Towers,
  params: Any,
  preferred: jax.Array,
  other: jax.Array,
  ids: jax.Array,
  *,
  contrast: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes -log sigmoid(s_w - s_l), and CLIP's loss on the preferred images.

  s is exp(logit_scale) times the cosine of image and prompt. CLIP's loss (Radford et al. 2021,
  arXiv 2103.00020) is the cross-entropy of a batch's prompts for an image and of its images for
  a prompt; rows of an equal prompt do not count as wrong. It has a scale of its own, since its
  choices are far surer than the annotator's.

  Args:
    towers: the modules.
    params: from `init_params`.
    preferred: uint8 [B, S, S, 3].
    other: uint8 [B, S, S, 3].
    ids: token ids of the prompts, int [B, L].
    contrast: weight of CLIP's loss.

  Returns:
    The mean loss, and its parts and the accuracy by name.
  """
  pixels = jnp.concatenate([preferred, other]).astype(jnp.float32) / 255.0
  units = (pixels - preference_towers.MEAN) / preference_towers.STD
  of_images = preference_towers.image_features(towers, params["towers"], units)
  of_texts = preference_towers.text_features(towers, params["towers"], ids)
  good, bad = jnp.split(of_images, 2)
  scale = jnp.exp(params["towers"]["logit_scale"])
  margin = scale * jnp.sum((good - bad) * of_texts, axis=-1)
  pairs = -jax.nn.log_sigmoid(margin).mean()
  logits = jnp.exp(params["contrast_scale"]) * good @ of_texts.T
  same = (ids[:, None] == ids[None]).all(axis=-1) & ~jnp.eye(len(ids), dtype=bool)
  logits = jnp.where(same, -jnp.inf, logits)
  matches = [jnp.diag(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1)]
  clip = -0.5 * (matches[0] + matches[1])
  loss = pairs + contrast * clip
  accuracy = (margin > 0).mean()
  return loss, {"loss": loss, "pairs": pairs, "contrast": clip, "accuracy": accuracy}


def make_preference_step(
  towers: Towers,
  tx: optax.GradientTransformation,
  *,
  contrast: float,
  ema_decay: float,
) -> Callable:
  """Makes `step(state, preferred, other, ids) -> (state, metrics)`, jitted; donates `state`."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, preferred, other, ids):
    def loss(params):
      return preference_loss(towers, params, preferred, other, ids, contrast=contrast)

    grads, metrics = jax.grad(loss, has_aux=True)(state.params)
    metrics |= {"grad_norm": optax.global_norm(grads)}
    return fit.apply_gradients(state, grads, tx, ema_decay=ema_decay), metrics

  return step
