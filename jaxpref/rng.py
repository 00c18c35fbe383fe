"""Random keys of a run as a function of its seed, a purpose and the step.

No generator state is stored, so a resumed run samples what an uninterrupted run samples.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def key_of(seed: int | jax.Array, purpose: str, step: int | jax.Array) -> jax.Array:
  """Returns the random key for `purpose` at `step`.

  Args:
    seed: the run's seed; may be traced.
    purpose: a name; different names give independent keys.
    step: an integer; may be traced.
  """
  named = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
  return jax.random.fold_in(named, step)


def sample_dropped_rows(
  seed: int | jax.Array, update: int | jax.Array, rows: int, *, rate: float
) -> jax.Array:
  """Samples which rows of a batch lose their prompt, bool [B].

  Args:
    seed: the run's seed.
    update: number of completed updates; the result depends on nothing else of the run.
    rows: B.
    rate: expected share of dropped rows, 0 to 1.
  """
  return jax.random.bernoulli(key_of(seed, "prompt_dropout", update), rate, (rows,))


def drop_prompts(dropped: jax.Array, cond: Any, uncond: Any) -> Any:
  """Replaces the conditioning of dropped rows by the unconditional one.

  Args:
    dropped: which rows to replace, bool [B].
    cond: conditioning, a tree of arrays [B, ...].
    uncond: conditioning of the empty prompt, a tree of arrays [1, ...].

  Returns:
    A tree like `cond`. Sizes ('time_ids') do not belong to the prompt and stay.
  """

  def one(with_prompt, without):
    where = dropped.reshape((-1,) + (1,) * (with_prompt.ndim - 1))
    return jnp.where(where, without.astype(with_prompt.dtype), with_prompt)

  found = jax.tree.map(one, cond, uncond)
  if isinstance(found, dict) and "time_ids" in found:
    found["time_ids"] = cond["time_ids"]
  return found
