"""Throughput of the neural scorers at full width, with weights of no meaning.

  python benchmarks/scorers.py [--networks clip_h14 ...] [--images=2] [--dtype=float32]
    [--out=docs/performance/gpu_scorers.json]
  python benchmarks/scorers.py --table

Measures images a second of each network, images and prompts together, and of each way to resize
an image. FLOPs are counted from the program, and hours for a million images follow from them.
The results replace those of the same network in --out, by default docs/scorers/throughput.json,
from which the table of docs/scorers.md is made. benchmarks/gpu.sh has the parts for a GPU.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "scorers" / "throughput.json"
# What each network serves.
NETWORKS = {
  "clip_h14": "`clip.h14`, `pickscore.v1`, `hpsv2.v2_0`, `hpsv2.v2_1`",
  "clip_l14": "`clip.l14`",
  "clip_l14_images": "`aesthetic.v1`, `aesthetic.v2`",
  "image_reward": "`imagereward.v1`",
}
SUSTAINED = 100e12  # FLOP/s in the table: a third of an A100's peak in bfloat16


def main(argv: list[str]) -> None:
  """Measures the networks and writes their results, or prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
  parser.add_argument("--images", type=int, default=2, help="of a batch")
  parser.add_argument("--repeats", type=int, default=2)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--out", type=Path, default=TARGET, help="JSON file for the results")
  parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
  options = parser.parse_args(argv)
  out = options.out
  found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
  if not options.table:
    from jaxpref.runtime import workdir

    found["machine"] = machine()
    found["resizing"] = resizing()
    for name in options.networks:
      found.setdefault("networks", {})[name] = measure(name, options)
      workdir.write_bytes(out, (json.dumps(found, indent=1) + "\n").encode())
  print(table(found))


def machine() -> dict:
  """Returns the device, the number of cores in use, date and versions."""
  import jax

  models = [
    line.partition(":")[2].strip()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    if line.startswith("model name")
  ]
  device = jax.devices()[0]
  return {
    "device": device.device_kind if device.platform != "cpu" else models[0],
    "cores": len(os.sched_getaffinity(0)),
    "date": str(datetime.date.today()),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def resizing() -> dict[str, float]:
  """Returns milliseconds to resize an image of 512 x 512, by variant, on one core."""
  import numpy as np

  from jaxpref.scorers.base import pixels

  image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
  times = {}
  for variant in pixels.VARIANTS:
    pixels.prepare(image, variant, 224)
    start = time.perf_counter()
    for _ in range(10):
      pixels.prepare(image, variant, 224)
    times[variant] = round(100 * (time.perf_counter() - start), 2)
  return times


def measure(name: str, options) -> dict:
  """Compiles a network's program and times it."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from jaxpref.training import flops

  program, abstract, batch = build(name, options)
  one = jax.tree.map(lambda x: x[:1], batch)
  cost = flops.count(jax.make_jaxpr(program)(abstract, one))
  params = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), abstract)
  start = time.perf_counter()
  compiled = jax.jit(program).lower(params, batch).compile()
  compile_s = time.perf_counter() - start
  np.asarray(compiled(params, batch))
  times = []
  for _ in range(options.repeats):
    start = time.perf_counter()
    np.asarray(compiled(params, batch))
    times.append(time.perf_counter() - start)
  leaves = jax.tree.leaves(abstract)
  return {
    "dtype": options.dtype,
    "images": options.images,
    "parameters": sum(leaf.size for leaf in leaves),
    "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    "flops": cost,
    "compile_s": round(compile_s, 1),
    "images_per_s": options.images / min(times),
  }


def build(name: str, options):
  """Returns a program (params, batch) -> scores, the shapes of its parameters, and a batch."""
  import jax.numpy as jnp
  import numpy as np

  from jaxpref.models import blip, clip_towers
  from jaxpref.scorers.base import batches, pixels

  dtype, count = np.dtype(options.dtype), options.images
  images = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)
  units = lambda x: pixels.normalize(x, clip_towers.MEAN, clip_towers.STD)  # noqa: E731
  if name == "image_reward":
    module = blip.build_image_reward(blip.IMAGE_REWARD, dtype=dtype)
    tokens = np.ones((count, 35), np.int32)

    def program(params, batch):
      with batches.precision(dtype):
        seen = units(batch["images"])
        return module.apply({"params": params}, seen, batch["ids"], batch["ids"])

    return program, blip.abstract_params(module), {"images": images, "ids": tokens}
  clip = clip_towers.build_clip(getattr(clip_towers, name.split("_")[1].upper()), dtype=dtype)
  abstract = clip_towers.abstract_clip(clip)
  if name.endswith("images"):
    abstract = {k: v for k, v in abstract.items() if not k.startswith("text")}

  def program(params, batch):
    with batches.precision(dtype):
      seen = clip_towers.image_features(clip, params, units(batch["images"]))
      if name.endswith("images"):
        return seen
      return jnp.sum(seen * clip_towers.text_features(clip, params, batch["ids"]), axis=-1)

  return program, abstract, {"images": images, "ids": np.ones((count, 77), np.int32)}


def table(found: dict) -> str:
  """Returns the results as a table in Markdown."""
  lines = [
    "| scorers | parameters, millions | weights, GB | GFLOPs an image | images a second here "
    f"| hours for a million images at {SUSTAINED / 1e12:.0f} TFLOP/s |",
    "|---|---|---|---|---|---|",
  ]
  for name, row in sorted(found["networks"].items()):
    lines.append(
      f"| {NETWORKS[name]} | {row['parameters'] / 1e6:,.0f} | {row['bytes'] / 1e9:.2f} "
      f"| {row['flops'] / 1e9:,.0f} | {row['images_per_s']:.2f} "
      f"| {1e6 * row['flops'] / SUSTAINED / 3600:.2f} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  main(sys.argv[1:])
