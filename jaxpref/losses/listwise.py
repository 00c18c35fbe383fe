"""Listwise DPO: the whole ranking of k images of a prompt, by Plackett and Luce's model.

The form of Rafailov et al., "Direct Preference Optimization", 2023, appendix A.3
(https://arxiv.org/abs/2305.18290), on Diffusion-DPO's rewards. For k = 2 it is Diffusion-DPO.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses.base import Needs, Terms

NEEDS = Needs(rows="lists", reference=True)


def plackett_luce_loss(err: jax.Array, ref: jax.Array, *, beta: float) -> jax.Array:
  """-log of the probability that the images are chosen in the order of their ranks.

  With s = -beta / 2 (err - ref): sum over i of logsumexp(s[i:]) - s[i].

  Args:
    err: the policy's errors, ranked from best to worst, at one timestep and noise, [B, k].
    ref: the reference's, [B, k].
    beta: as for `dpo_loss`.

  Returns:
    Losses, [B]; ln k! where policy = reference.
  """
  score = -0.5 * beta * (err - ref)
  # The rest of the list from each rank on: a cumulative logsumexp from the end.
  rest = jax.lax.cumlogsumexp(score, axis=1, reverse=True)
  return (rest - score).sum(axis=1)


def objective(terms: Terms, *, beta):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  ranks = sorted(terms.err, key=int)  # not by their letters, among which '10' precedes '2'
  err, ref = (jnp.stack([of[r] for r in ranks], axis=1) for of in (terms.err, terms.ref))
  reward = ref - err
  pairs = reward[:, :-1] - reward[:, 1:]  # neighbours in rank
  return plackett_luce_loss(err, ref, beta=beta), {
    "rewards/margin": reward[:, 0] - reward[:, -1],
    "rewards/accuracy": (pairs > 0).astype(jnp.float32).mean(axis=1),
  }
