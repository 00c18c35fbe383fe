"""Listwise DPO: the Plackett-Luce likelihood of the ranking of k images of a prompt.

The form of Rafailov et al., "Direct Preference Optimization", 2023, appendix A.3
(https://arxiv.org/abs/2305.18290), with Diffusion-DPO's rewards. For k = 2 it is
Diffusion-DPO.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="lists", reference=True)


def plackett_luce_loss(err: jax.Array, ref: jax.Array, *, beta: float) -> jax.Array:
  """Computes -log of the probability that images are chosen in the order of their ranks.

  With s = -beta / 2 (err - ref): sum over i of logsumexp(s[i:]) - s[i].

  Args:
    err: the policy's errors, ranked from best to worst, at one timestep and noise, [B, k].
    ref: the reference's errors, [B, k].
    beta: as for `dpo_loss`.

  Returns:
    Losses, [B]; ln k! where policy = reference.
  """
  score = -0.5 * beta * (err - ref)
  # logsumexp(s[i:]) for every i: a cumulative logsumexp from the end.
  rest = jax.lax.cumlogsumexp(score, axis=1, reverse=True)
  return (rest - score).sum(axis=1)


def objective(terms: Terms, *, beta):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  ranks = sorted(terms.err, key=int)  # as numbers: as strings, '10' would precede '2'
  err, ref = (jnp.stack([of[r] for r in ranks], axis=1) for of in (terms.err, terms.ref))
  reward = ref - err
  pairs = reward[:, :-1] - reward[:, 1:]  # adjacent ranks
  return plackett_luce_loss(err, ref, beta=beta), {
    "rewards/margin": reward[:, 0] - reward[:, -1],
    "rewards/accuracy": (pairs > 0).astype(jnp.float32).mean(axis=1),
  }
