"""Samples with candidates on a mesh, for test_step_candidates.py.

python candidates_main.py PIPELINE DATA FSDP KIND APART

Prints JSON, see `sample`.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import toy_scorers

from jaxpref import sharding
from jaxpref.data import encode
from jaxpref.models import load_pipeline
from jaxpref.models import vae as vae_lib
from jaxpref.plan import tpu_compiler
from jaxpref.training import (
  flops,
  load_run,
  policy_sampler,
  programs,
  step_candidates,
  step_rows,
)
from jaxpref.training.judge import Judge
from jaxpref.training.latent_judge import LatentJudge
from jaxpref.training.step_judge import StepJudge

STEPS, FIRST, ETA, SCALE = 4, 1, 0.8, 3.0


def make_judge(pipeline, kind):
  """Returns a judge: of the 'images' twice the mean of red, of their 'levels', or of 'latents'.

  That of the levels multiplies the mean by 1 + t / 100, and adds the length of the caption.
  """
  if kind == "images":
    vae = pipeline.modules["vae"]
    return Judge({"red": toy_scorers.REWARDS["red"]("float32")}, (2.0,), vae, 1)

  if kind == "levels":
    red = toy_scorers.REWARDS["red"]("float32")._replace(tokenize=_lengths)

    def score_images(trained, images, t, ids):
      mean = 255 * images[..., 0].mean(axis=(1, 2))
      return trained["model"]["factor"] * mean * (1 + t / 100) + ids[:, 0] + trained["time"]

    trained = {"model": {"factor": np.float32(2.0)}, "time": np.float32(0.0)}
    reward = load_run.StepReward(pipeline, red, trained, "")
    return StepJudge(reward, score_images, "float32")

  def score(params, x_t, t, cond, uncond):
    """Returns the mean of the latents and of the text, more for larger t."""
    text = cond["text"].mean(axis=(1, 2)) - uncond["text"].mean()
    return params["factor"] * (x_t.mean(axis=(1, 2, 3)) + text) * (1 + t)

  params = {"encoder": {}, "factor": np.float32(3.0)}
  return LatentJudge(load_run.RewardModel(pipeline, params, 1, 1.0, ""), score, "float32")


def _lengths(captions):
  return np.array([[len(caption)] for caption in captions], np.int32)


def sampled_flops(checked):
  """Returns the FLOPs of a round's sampler as it is traced, without decoding the samples."""
  config, pipeline, judge = checked.config, checked.pipeline, checked.judge
  images = config.rounds.num_prompts * config.rounds.images_per_prompt
  program, arguments = programs.abstract_programs(checked)
  plan, seeds = step_rows.plan_steps(config, pipeline), np.arange(images, dtype=np.uint32)
  eta, first = step_rows.etas(config, plan, 0)
  chosen = eta, step_rows.pick(plan, first, images, [0]), step_rows.start_seeds(config, seeds)
  params, tokens = judge.place(pipeline, checked.mesh), judge.tokenize([""] * images)
  cond = pipeline.abstract_cond(images), pipeline.abstract_cond(1)
  given = arguments.state.params, params, *cond, seeds, chosen, tokens
  traced = flops.count(jax.make_jaxpr(program.sample)(*given))
  vae, latents = pipeline.modules["vae"], np.zeros((images, *pipeline.latent_shape), np.float32)
  decode = jax.make_jaxpr(functools.partial(vae_lib.decode, vae))
  return traced - flops.count(decode(params["vae"], latents))


def make_program(
  pipeline, mesh, captions, count, gaps=(0.0, 0.0), kind="images", apart=1, steps=STEPS
):
  """Returns the sampler, the judge's parameters, and what it reads of captions."""
  judge = make_judge(pipeline, kind)
  program = step_candidates.make_candidate_sampler(
    *(pipeline.make_denoise(mesh=mesh), pipeline, judge),
    **{"mesh": mesh, "solver": "ddim", "num_steps": steps, "guidance": SCALE},
    **{"candidates": count, "first": FIRST, "apart": apart, "gaps": gaps},
  )
  return program, judge.place(pipeline, mesh), judge.tokenize(captions)


def chosen_of(seeds, steps=STEPS):
  """Returns the strength of each step's noise, the steps with candidates, and the starts."""
  picks = np.broadcast_to(np.arange(FIRST, steps), (len(seeds), steps - FIRST))
  return jnp.full(steps, ETA), picks, seeds


def sample(path, *, data, fsdp, kind, apart=1):
  """Samples eight images with three candidates.

  Returns:
    Sums of latents, the scores, and how many MiB are communicated, also by a sampler without
    candidates.
  """
  pipeline, mesh = load_pipeline(path), sharding.make_mesh(data=data, fsdp=fsdp)
  captions = [f"{n} {color} circles" for n in ("two", "three") for color in ("red", "blue")] * 2
  seeds = np.arange(8, dtype=np.uint32)
  program, placed, tokens = make_program(pipeline, mesh, captions, 3, kind=kind, apart=apart)
  eta, picks, _ = chosen_of(seeds)
  cond = encode.encode_prompts(pipeline, mesh, captions)
  cond, tokens, at, picks = sharding.place_batch((cond, tokens, seeds, picks), mesh)
  empty = sharding.replicate(encode.encode_no_prompt(pipeline, mesh), mesh)
  params = sharding.place_params(pipeline.params["unet"], mesh)
  given = params, placed, cond, empty, at, (sharding.replicate(eta, mesh), picks, at), tokens
  compiled = program.lower(*given).compile()
  plain = policy_sampler.make_policy_sampler(
    *(pipeline.make_denoise(mesh=mesh), pipeline),
    **{"solver": "ddim", "order": 1, "num_steps": STEPS, "guidance": SCALE},
  )
  alone = plain.lower(params, placed["vae"], cond, empty, at, given[-2]).compile()
  latents, _, steps = jax.tree.map(np.asarray, compiled(*given))
  moved = [tpu_compiler.collectives(of.as_text()) for of in (compiled, alone)]
  return {
    "devices": jax.device_count(),
    "latents": latents.sum(axis=(1, 2, 3)).tolist(),
    "better": steps.labels["better"].tolist(),
    "worse": steps.labels["worse"].tolist(),
    "moved": [sum(of["MiB"] for of in one.values()) for one in moved],
  }


if __name__ == "__main__":
  data, fsdp, apart = (int(sys.argv[i]) for i in (2, 3, 5))
  found = sample(sys.argv[1], data=data, fsdp=fsdp, kind=sys.argv[4], apart=apart)
  print(json.dumps(found))
