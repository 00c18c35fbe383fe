"""Every random draw of a run as a function of its seed, its purpose and its step.

Nothing random is carried along, so a resumed run draws what an uninterrupted one draws.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def key_of(seed: int | jax.Array, purpose: str, step: int | jax.Array) -> jax.Array:
  """The key for `purpose` at `step`.

  Args:
    seed: of the run; may be traced.
    purpose: a name; other names give independent keys.
    step: integer; may be traced.
  """
  named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  return jax.random.fold_in(named, step)


def dropped_rows(
  seed: int | jax.Array, update: int | jax.Array, rows: int, *, rate: float
) -> jax.Array:
  """Which rows of a batch lose their prompt, bool [B].

  Args:
    seed: of the run.
    update: number of updates done; the same rows are dropped wherever it is asked.
    rows: B.
    rate: share of rows, 0 to 1.
  """
  return jax.random.bernoulli(key_of(seed, "prompt_dropout", update), rate, (rows,))


def without_prompts(dropped: jax.Array, cond: Any, uncond: Any) -> Any:
  """Takes the prompts away from rows.

  Args:
    dropped: from which, bool [B].
    cond: what the denoiser is told, a tree of arrays [B, ...].
    uncond: the same without a prompt, [1, ...].

  Returns:
    A tree like `cond`.
  """

  def one(with_prompt, without):
    where = dropped.reshape((-1,) + (1,) * (with_prompt.ndim - 1))
    return jnp.where(where, without.astype(with_prompt.dtype), with_prompt)

  return jax.tree.map(one, cond, uncond)
