"""Timings of saving checkpoints: asynchronous and synchronous, in one run.

  python benchmarks/checkpoints.py --out=docs/performance/cpu_checkpoints.json

A jitted step updates a state of the given size, and `jaxpref.runtime.checkpoint` saves it,
alternately without waiting and waiting until the checkpoint is complete. `stall`: seconds for
which the call of `save` (and `wait`) blocked the loop. `lost beside`: additional seconds that
the steps took until an asynchronous checkpoint was complete; if the device is this CPU, writing
slows them down.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpref.runtime import checkpoint


def main(argv: list[str]) -> None:
  """Measures, prints and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=int, default=512, help="size of the state")
  parser.add_argument("--width", type=int, default=2048, help="size of the step's matrices")
  parser.add_argument("--saves", type=int, default=7, help="number of saves of each kind")
  parser.add_argument("--directory", type=Path, help="to write to; default: a temporary one")
  parser.add_argument("--out", type=Path, help="a file to write the numbers to")
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory(dir=options.directory) as directory:
    found = measure(options, Path(directory))
  ratio = found["stall asynchronous"] / found["stall synchronous"]
  found |= {
    "ratio": ratio,
    "megabytes": options.megabytes,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python "
    f"{platform.python_version()}",
    "date": str(date.today()),
    "versions": {name: metadata.version(name) for name in ("jax", "orbax-checkpoint")},
  }
  print(json.dumps(found, indent=2))
  if options.out:
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, directory: Path) -> dict[str, float]:
  """Returns medians over saves, in seconds."""
  arrays = options.megabytes // 16
  keys = jax.random.split(jax.random.key(0), arrays)
  # Random values, as weights are: compressible arrays would be written much faster.
  state = {f"array_{i}": jax.random.normal(key, (2048, 2048)) for i, key in enumerate(keys)}
  state["x"] = jnp.ones((options.width, options.width))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    x = state["x"]
    for _ in range(4):
      x = jnp.tanh(x @ x / options.width)
    return {name: a + 1e-3 for name, a in state.items() if name != "x"} | {"x": x}

  def update() -> float:
    nonlocal state
    began = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return time.perf_counter() - began

  ckptr = checkpoint.Checkpointer(directory, keep=1)
  update()  # compiles
  usual: list[float] = []
  stalls: dict[bool, list[float]] = {True: [], False: []}
  slower: list[float] = []
  done = 0
  for _ in range(options.saves):
    for waits in (True, False):
      usual += [update() for _ in range(3)]
      done += 1
      began = time.perf_counter()
      ckptr.save(done, state, None, {})
      if waits:
        ckptr.wait()
      stalls[waits].append(time.perf_counter() - began)
      beside = []
      while ckptr._pending and not ckptr._pending[1].done():
        beside.append(update())
      slower.append(sum(beside) - statistics.median(usual) * len(beside))
      ckptr.wait()
  ckptr.close()
  return {
    "step": statistics.median(usual),
    "stall synchronous": statistics.median(stalls[True]),
    "stall asynchronous": statistics.median(stalls[False]),
    "lost beside": statistics.median(slower[1::2]),
  }


if __name__ == "__main__":
  main(sys.argv[1:])
