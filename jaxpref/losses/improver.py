"""The improvement model: a denoiser of the preferred image that is shown the other one.

Its UNet reads the latents of a clean image beside the noised ones (`unet.widen_input`) and
learns p(x_w | x_l, c). A batch mixes three tasks, drawn for each row:

  winning:        shown x_l, told the prompt, target x_w;
  reconstruction: shown x in {x_w, x_l}, told nothing, target the same x;
  unconditional:  shown zeros, told nothing, target x in {x_w, x_l}.

The last two are what `guidance.by_text_and_image` needs, whose three evaluations they are;
and without reconstruction a model whose new weights begin at zero may learn to ignore what it
is shown. The paper gives no weights for the mixture: those of the configuration are ours.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import rng
from jaxpref.errors import UserError
from jaxpref.losses.base import Arranged, Needs, Terms
from jaxpref.losses.sft import sft_loss

NEEDS = Needs(rows="pairs", condition="image", arms=("x",))
TASKS = ("winning", "reconstruction", "unconditional")


def arrange(
  x0: jax.Array,
  cond: Any,
  uncond: Any,
  key: jax.Array,
  *,
  weight_winning: float,
  weight_reconstruction: float,
  weight_unconditional: float,
) -> Arranged:
  """Draws each row's task.

  Args:
    x0: winners and losers, latents [B, 2, C, h, w].
    cond: prompts, a tree of [B, ...].
    uncond: the empty prompt, [1, ...].
    key: of the draws.
    weight_winning: how often the first task is drawn, beside the other two weights.
    weight_reconstruction: the second.
    weight_unconditional: the third.

  Returns:
    One image a row as target, what is told and shown, and the label 'task', an index of
    `TASKS`.

  Raises:
    UserError: all weights are zero.
  """
  weights = jnp.array([weight_winning, weight_reconstruction, weight_unconditional])
  if not weight_winning + weight_reconstruction + weight_unconditional > 0:
    raise UserError("loss.weight_winning, ..._reconstruction, ..._unconditional: all are 0")
  rows = x0.shape[0]
  task = jax.random.categorical(jax.random.fold_in(key, 0), jnp.log(weights), shape=(rows,))
  side = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (rows,)).astype(jnp.int32)
  by_row = lambda x: x.reshape((-1, 1, 1, 1))  # noqa: E731
  winner, loser = x0[:, 0], x0[:, 1]
  own = jnp.where(by_row(side == 0), winner, loser)
  target = jnp.where(by_row(task == 0), winner, own)
  shown = jnp.where(by_row(task == 0), loser, jnp.where(by_row(task == 1), own, 0.0))
  told = rng.without_prompts(task != 0, cond, uncond)
  return Arranged(target[:, None], told, shown, {"task": task})


def objective(terms: Terms):
  """Loss and metrics; the contract is in `jaxpref.losses.base`."""
  err, task = terms.err["x"], terms.labels["task"]
  metrics = {}
  for i, name in enumerate(TASKS):
    drawn = (task == i).astype(err.dtype)
    share = terms.mean(drawn)
    # Averaged over the batch, the mean over the rows of this task; 0 where there are none.
    metrics[f"err/{name}"] = err * drawn / jnp.where(share > 0, share, 1.0)
  return sft_loss(err), metrics
