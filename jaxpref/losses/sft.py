"""Supervised fine-tuning on expert images: the denoising error itself."""

import jax

ARMS = ("e",)
ROLLOUT = False
REFERENCE = False
HYPER = ()


def sft_loss(err: jax.Array) -> jax.Array:
  """The plain denoising loss.

  Args:
    err: denoising errors of expert images, [B].

  Returns:
    The same, [B].
  """
  return err


def objective(err, ref):
  """Loss and metrics from the arms' errors; the contract is in `jaxpref.losses`."""
  del ref
  return sft_loss(err["e"]), {}
