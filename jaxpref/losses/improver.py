"""The improvement model: it denoises the preferred image, given the other one.

Its UNet reads the latents of a clean input image beside the noised ones (`pipeline.widen`)
and learns p(x_w | x_l, c). A batch mixes three tasks; each row gets a random one:

  task             input image        prompt   target
  winning          x_l                c        x_w
  reconstruction   x in {x_w, x_l}    empty    the same x
  unconditional    zeros              empty    x in {x_w, x_l}

The last two tasks train the other two evaluations of `guidance.by_text_and_image`. Without
reconstruction, the input weights, which begin at zero, may learn to ignore the input image. The
paper does not state the mixture: the weights in the configuration are our choice.
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
  """Samples each row's task.

  Args:
    x0: latents of preferred and other images, [B, 2, C, h, w].
    cond: conditioning of the prompts, a tree of [B, ...].
    uncond: conditioning of the empty prompt, a tree of [1, ...].
    key: random key.
    weight_winning: relative frequency of the task 'winning'.
    weight_reconstruction: relative frequency of the task 'reconstruction'.
    weight_unconditional: relative frequency of the task 'unconditional'.

  Returns:
    One target image per row, its conditioning and input image, and the label 'task', an index
    into `TASKS`.

  Raises:
    UserError: all weights are zero.
  """
  weights = jnp.array([weight_winning, weight_reconstruction, weight_unconditional])
  if not weight_winning + weight_reconstruction + weight_unconditional > 0:
    raise UserError(
      "loss.weight_winning, loss.weight_reconstruction and loss.weight_unconditional are all "
      "0: set one of them above 0"
    )
  rows = x0.shape[0]
  task = jax.random.categorical(jax.random.fold_in(key, 0), jnp.log(weights), shape=(rows,))
  side = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (rows,)).astype(jnp.int32)
  by_row = lambda x: x.reshape((-1, 1, 1, 1))  # noqa: E731
  winner, loser = x0[:, 0], x0[:, 1]
  own = jnp.where(by_row(side == 0), winner, loser)
  target = jnp.where(by_row(task == 0), winner, own)
  image = jnp.where(by_row(task == 0), loser, jnp.where(by_row(task == 1), own, 0.0))
  cond = rng.drop_prompts(task != 0, cond, uncond)
  return Arranged(target[:, None], cond, image, {"task": task})


def objective(terms: Terms):
  """Returns the loss and metrics, as `jaxpref.losses.base` describes."""
  err, task = terms.err["x"], terms.labels["task"]
  metrics = {}
  for i, name in enumerate(TASKS):
    of_task = (task == i).astype(err.dtype)
    share = terms.mean(of_task)
    # The average over the batch is then the mean over this task's rows; 0 without such rows.
    metrics[f"err/{name}"] = err * of_task / jnp.where(share > 0, share, 1.0)
  return sft_loss(err), metrics
