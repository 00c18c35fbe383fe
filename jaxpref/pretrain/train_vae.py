"""First stage of the base's pretraining: the VAE."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from jaxpref.models import vae as vae_lib

# What turns latents into pictures; trained alone, it leaves the latents as they are.
DECODER = ("decoder", "post_quant_conv")


@flax.struct.dataclass
class VaeState:
  """Parameters that are trained, optimizer state and the number of updates done."""

  params: Any
  opt_state: Any
  update: jax.Array


def vae_config(config: Any) -> dict[str, Any]:
  """Diffusers' `vae/config.json` for the shapes world; the scaling factor comes later."""
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
  }


def init_vae(vae: Any, key: jax.Array) -> Any:
  """Random parameters, with every residual branch silent.

  A bare chain of convolutions passes colours on from the first updates; the branches learn
  to bend it later.
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
  """Absolute and squared error of the reconstruction, and the divergence from N(0, I).

  Args:
    vae: module.
    params: its parameters.
    images: uint8 [B, H, W, 3].
    key: for the posterior's sample.
    kl_weight: per image, on the KL divergence summed over the latent.
    edge_weight: on the absolute error of the steps between neighbouring pixels, which a
      blurred edge gets wrong twice.

  Returns:
    The loss, and its parts by name.
  """
  pixels = vae_lib.to_unit(images)
  mean, logvar = vae_lib.encode_moments(vae, params, pixels)
  latent = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  output = vae.apply({"params": params}, latent, method=vae.decode).sample
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
  """`step(state, frozen, images) -> (state, metrics)`, jitted, the state donated.

  `frozen` are the parameters that the state does not hold.
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
