"""The first pretraining stage: the VAE."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jaxpref.models import vae as vae_lib

# The modules that map latents to images. Training them alone does not change the latents.
DECODER = ("decoder", "post_quant_conv")


@flax.struct.dataclass
class VaeState:
  """Trained parameters, optimizer state and the number of completed updates."""

  params: Any
  opt_state: Any
  update: jax.Array


def vae_config(config: ConfigDict) -> dict[str, Any]:
  """Returns diffusers' `vae/config.json` for the shapes world; the scale is set later."""
  settings = config.vae
  levels = len(settings.channels)
  return {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "block_out_channels": list(settings.channels),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": settings.latent_channels,
    "norm_num_groups": settings.norm_groups,
    "sample_size": config.corpus.image_size,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,  # diffusers' pipeline of SD3 needs it
  }


def init_vae(vae: Any, key: jax.Array) -> Any:
  """Initializes parameters so that every residual branch outputs zero.

  The remaining chain of convolutions transmits colours from the first updates on; the branches
  then learn the rest.
  """
  flat = flax.traverse_util.flatten_dict(vae.init_weights(key))
  silent = (("conv2", "kernel"), ("proj_attn", "kernel"))
  flat = {k: jnp.zeros_like(v) if k[-2:] in silent else v for k, v in flat.items()}
  return flax.traverse_util.unflatten_dict(flat)


def vae_loss(
  vae: Any,
  params: Any,
  images: jax.Array,
  key: jax.Array,
  *,
  kl_weight: float,
  edge_weight: float,
):
  """Computes the reconstruction error and the KL divergence from N(0, I).

  Args:
    vae: module.
    params: its parameters.
    images: uint8 [B, H, W, 3].
    key: for the sample from the posterior.
    kl_weight: weight of the KL divergence, which is summed over the latent, per image.
    edge_weight: weight of the absolute error of the differences between adjacent pixels; a
      blurred edge has two such errors.

  Returns:
    The loss, and its terms by name.
  """
  pixels = vae_lib.to_unit(images)
  mean, logvar = vae_lib.encode_moments(vae, params, pixels)
  latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  output = vae.apply({"params": params}, latent, method="pixels")
  absolute = jnp.abs(output - pixels).mean()
  squared = jnp.square(output - pixels).mean()
  kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3)).mean()
  error = output - pixels
  edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
  loss = absolute + squared + kl_weight * kl + edge_weight * edges
  return loss, {"loss": loss, "l1": absolute, "mse": squared, "kl": kl, "edges": edges}


def make_vae_step(
  vae: Any,
  tx: optax.GradientTransformation,
  key: jax.Array,
  *,
  kl_weight: float,
  edge_weight: float,
):
  """Makes `step(state, frozen, images) -> (state, metrics)`, jitted; `state` is donated.

  `frozen` holds the parameters that the state does not have.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, frozen, images):
    def loss(params):
      return vae_loss(
        vae,
        {**frozen, **params},
        images,
        jax.random.fold_in(key, state.update),
        kl_weight=kl_weight,
        edge_weight=edge_weight,
      )

    grads, metrics = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return VaeState(params, opt_state, state.update + 1), metrics

  return step
