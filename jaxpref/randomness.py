"""Every random draw of a run as a function of its seed, its purpose and its step.

Nothing random is carried along, so a resumed run draws what an uninterrupted one draws.
"""

import zlib

import jax
import jax.numpy as jnp


def key_of(seed: int, purpose: str, step: int | jax.Array) -> jax.Array:
  """The key for `purpose` at `step`.

  Args:
    seed: of the run.
    purpose: a name; other names give independent keys.
    step: integer, may be traced.
  """
  named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  return jax.random.fold_in(named, step)


def drop_prompts(
  seed: int, update: jax.Array, cond: jax.Array, empty_cond: jax.Array, *, rate: float
) -> jax.Array:
  """Replaces the prompts of a random share of rows by the empty prompt.

  Args:
    seed: of the run.
    update: number of updates done; the same rows are dropped wherever it is asked.
    cond: text embeddings [B, L, D].
    empty_cond: of the empty prompt, [1, L, D].
    rate: share of rows, 0 to 1.

  Returns:
    Text embeddings [B, L, D].
  """
  key = key_of(seed, "prompt_dropout", update)
  dropped = jax.random.bernoulli(key, rate, (cond.shape[0], 1, 1))
  return jnp.where(dropped, empty_cond.astype(cond.dtype), cond)
