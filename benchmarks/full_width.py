"""Time and memory of a real model at full width with random weights: loading, DRO, sampling.

  python benchmarks/full_width.py --configs=jaxpref/pipelines/sdxl --out=sdxl.json

The script writes the pipeline once (float16) under --work, measures in one process and prints a
JSON object: seconds of loading, of compilation and of each phase of an update, and the devices'
peak memory. Random weights cost the same as trained ones. On small devices, --lora-rank and
--size make the model fit:

  python benchmarks/full_width.py --configs=jaxpref/pipelines/sd15 \
    --dtype=float32 --lora-rank=8 --size=256 --updates=1
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import losses, sharding
from jaxpref.data import encode
from jaxpref.evaluation import sampling
from jaxpref.models import lora, save, text
from jaxpref.models import pipeline as pipeline_lib
from jaxpref.models import unet as unet_lib
from jaxpref.runtime import jax_setup
from jaxpref.training import optimizer, train_step
from jaxpref.training import rollout as rollout_lib


def main(argv: list[str]) -> None:
  """Measures as the flags say."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--configs", type=Path, required=True, help="directory with unet.json, vae.json, ...")
  add("--work", type=Path, default=Path("runs/full_width"), help="for the random pipeline")
  add("--out", type=Path, help="JSON file for the numbers, which are always printed")
  add("--dtype", default="bfloat16", help="computation dtype")
  add("--batch-size", type=int, default=2, help="rows of the DRO step")
  add("--updates", type=int, default=3, help="timed updates, after one that compiles")
  add("--size", type=int, help="image size in pixels; default: the model's training size")
  add("--lora-rank", type=int, default=0, help="train low-rank additions; 0: all parameters")
  add("--num-steps", type=int, default=20, help="number of solver steps")
  options = parser.parse_args(argv)
  jax_setup.use_all_cores()
  model = options.work / options.configs.name
  if not model.exists():
    # In another process, so that its memory does not count for the loader.
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_random, args=(options.configs, model))
    writer.start()
    writer.join()
    if writer.exitcode:
      sys.exit("the random pipeline could not be written")
  numbers = measure(model, options)
  print(json.dumps(numbers, indent=2))
  if options.out:
    options.out.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def write_random(configs_dir: Path, target: Path) -> None:
  """Writes a pipeline of these configurations with random weights and a matching tokenizer."""
  files = {f.parent.name: f for f in configs_dir.glob("*/*config.json")}
  files["model_index"] = configs_dir / "model_index.json"
  configs = {part: json.loads(f.read_text(encoding="utf-8")) for part, f in files.items()}
  for part in [p for p in configs if p.startswith("text_encoder")]:
    directory = (
      target.parent / f"{target.name}-tokenizers" / part.replace("text_encoder", "tokenizer")
    )
    text.train_tokenizer(["a red circle"], directory, vocab_size=560, max_length=77)
    fill_vocabulary(directory / "vocab.json", configs[part]["vocab_size"])
  rng = np.random.default_rng(0)

  def draw(leaf):
    fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25.0
    return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan))

  modules = pipeline_lib.build_modules(configs)
  params = {p: jax.tree.map(draw, pipeline_lib.abstract_params(m)) for p, m in modules.items()}
  save.save_pipeline(
    target,
    params,
    configs=configs,
    tokenizers_from=target.parent / f"{target.name}-tokenizers",
  )


def fill_vocabulary(file: Path, size: int) -> None:
  """Adds unused words before the two special tokens, up to `size` words."""
  words = list(json.loads(file.read_text(encoding="utf-8")))
  fill = [f"filler{i}" for i in range(size - len(words))]
  words = [*words[:-2], *fill, *words[-2:]]
  file.write_text(
    json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False), encoding="utf-8"
  )


def measure(model: Path, options: argparse.Namespace) -> dict:
  """Loads, trains and samples; returns the numbers."""
  mesh = sharding.make_mesh()
  numbers = {
    "model": model.name,
    "date": str(datetime.date.today()),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "versions": {p: metadata.version(p) for p in ("jax", "flax", "diffusers")},
    "python": platform.python_version(),
    "dtype": options.dtype,
    "trained": f"LoRA of rank {options.lora_rank}" if options.lora_rank else "all parameters",
    "rows": options.batch_size,
    "solver steps": options.num_steps,
  }
  seconds = numbers["seconds"] = {}
  began = time.perf_counter()
  pipeline = pipeline_lib.load_pipeline(str(model), dtype=jnp.dtype(options.dtype), mesh=mesh)
  jax.block_until_ready(pipeline.params)
  seconds["load"] = time.perf_counter() - began
  numbers["parameters"] = {
    part: sum(leaf.size for leaf in jax.tree.leaves(tree))
    for part, tree in pipeline.params.items()
  }
  numbers["pixels"] = options.size = options.size or pipeline.image_size
  numbers["host peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  _dro(pipeline, mesh, options, seconds)
  _draw(pipeline, mesh, options, seconds)
  numbers["host peak GB, at the end"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    numbers["device peak GB"] = stats["peak_bytes_in_use"] / 1e9
  return numbers


def _dro(pipeline, mesh, options, seconds) -> None:
  loss = losses.make_loss({"name": "dro", "margin": 1e-3})
  learning_rate = optimizer.make_schedule("constant", lr=1e-5, warmup_updates=0, num_updates=1)
  tx = optimizer.make_optimizer(learning_rate, weight_decay=0.01, clip_norm=1.0)
  ref = begin = pipeline.params["unet"]
  adapt = lambda trained, base: trained  # noqa: E731
  if options.lora_rank:
    targets = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$"
    key = jax.random.key(0)
    begin = lora.init_lora(ref, rank=options.lora_rank, targets=targets, key=key)
    adapt = lambda trained, base: lora.Adapted(base, trained, 1.0)  # noqa: E731
  make_state = lambda p: train_step.init_state(p, tx, seed=0, lagging_copy=False)  # noqa: E731
  placement = sharding.params_sharding(mesh, jax.eval_shape(make_state, begin))
  state = jax.jit(make_state, out_shardings=placement)(begin)
  denoise = unet_lib.make_denoise(pipeline.modules["unet"], mesh=mesh)
  step = train_step.make_train_step(
    denoise,
    pipeline.schedule,
    loss,
    tx,
    mesh=mesh,
    state_sharding=placement,
    arms=("e", "p"),
    learning_rate=learning_rate,
    ema_decay=0.9999,
    prompt_dropout=0.2,
    own_targets=True,
    adapt=adapt,
  )
  rollout = rollout_lib.make_rollout(
    denoise,
    pipeline.schedule,
    mesh=mesh,
    latent_shape=sampling.latent_shape_of(pipeline, (options.size, options.size)),
    num_steps=options.num_steps,
    solver="dpm_solver",
    order=2,
    guidance=1.0,
    prompt_dropout=0.2,
  )
  rows = options.batch_size
  size = options.size
  image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
  cond = encode.encode_prompts(pipeline, mesh, ["a red circle"] * rows)
  latents = encode.encode_images(pipeline, mesh, [image] * rows, batch_size=1)
  batch = sharding.place_batch({"latents": latents[:, None], "cond": cond}, mesh)
  uncond = jax.device_put(encode.encode_no_prompt(pipeline, mesh), sharding.replicated(mesh))
  took = {"rollout": [], "update": []}
  for _ in range(1 + options.updates):
    began = time.perf_counter()
    negatives = jax.block_until_ready(
      rollout(adapt(state.params, ref), state.seed, state.update, batch["cond"], uncond)
    )
    took["rollout"].append(time.perf_counter() - began)
    began = time.perf_counter()
    state, values = step(state, ref, uncond, batch, negatives)
    jax.block_until_ready(state)
    took["update"].append(time.perf_counter() - began)
    if not np.isfinite(value := float(values["loss"])):
      sys.exit(f"the loss is {value}")
  for name, times in took.items():
    seconds[f"{name}, the first, with its compilation"] = times[0]
    seconds[f"{name}, median"] = float(np.median(times[1:])) if times[1:] else None


def _draw(pipeline, mesh, options, seconds) -> None:
  generator = sampling.make_generator(
    pipeline,
    mesh,
    num_steps=options.num_steps,
    guidance=5.0,
    batch_size=1,
    decode="sliced",
    size=(options.size, options.size),
  )
  rows = mesh.size
  cond = encode.encode_prompts(pipeline, mesh, ["a red circle"] * rows)
  for name in ("images, the first, with compilation", "images"):
    began = time.perf_counter()
    generator(pipeline.params["unet"], cond, np.arange(rows))
    seconds[name] = time.perf_counter() - began


if __name__ == "__main__":
  main(sys.argv[1:])
