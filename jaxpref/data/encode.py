"""Images and captions to latents and text embeddings, once, before training."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.models import text
from jaxpref.models import vae as vae_lib
from jaxpref.models.pipeline import Pipeline


def encode_images(
  pipeline: Pipeline, mesh: Mesh, images: Sequence[np.ndarray], *, batch_size: int = 50
) -> np.ndarray:
  """Scaled latents, float32 [N, C, h, w], of uint8 images [H, W, 3]."""
  vae = pipeline.modules["vae"]
  run = jax.jit(lambda p, x: vae_lib.encode(vae, p, x))
  return in_batches(run, pipeline.params["vae"], np.stack(images), batch_size, mesh)


def encode_prompts(
  pipeline: Pipeline, mesh: Mesh, prompts: Sequence[str], *, batch_size: int = 100
) -> np.ndarray:
  """Text embeddings, [N, L, D]."""
  ids = text.tokenize(pipeline.tokenizer, prompts)
  encoder = pipeline.modules["text_encoder"]
  run = jax.jit(lambda p, x: text.encode_text(encoder, p, x))
  return in_batches(run, pipeline.params["text_encoder"], ids, batch_size, mesh)


def in_batches(run: Any, params: Any, rows: np.ndarray, size: int, mesh: Mesh) -> np.ndarray:
  """`run(params, rows)` in batches of one size, so that a single program serves all.

  Args:
    run: jitted; the rows it gets are spread over the mesh.
    params: what it takes besides, as numpy or jax arrays.
    rows: [N, ...].
    size: rows at once, at most; rounded up to fill the devices.
    mesh: from `sharding.make_mesh`.
  """
  size = sharding.round_up(min(size, len(rows)), mesh)
  params = jax.device_put(params, sharding.replicated(mesh))
  done = []
  for start in range(0, len(rows), size):
    part = rows[start : start + size]
    filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
    done.append(np.asarray(run(params, sharding.place_batch(filled, mesh)))[: len(part)])
  return np.concatenate(done)
