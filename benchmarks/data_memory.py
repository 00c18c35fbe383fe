"""Measures the host memory that a data set takes as it grows: build, opening, 200 batches.

Rows are generated pairs of 8 x 8 images, so that only their number matters. Latents and texts
are random numbers, written where the caches of the bundled model would be. Each part runs in a
process of its own, which reports its peak (`VmHWM`) and, apart from files that are mapped into
memory, `RssAnon` at the end.

  python benchmarks/data_memory.py --rows 100000 1000000 --out docs/data/memory.json

An interrupted measurement goes on with the sets that are already built.
"""

import argparse
import io
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCHES, BATCH = 200, 32
PER_CAPTION = 16


class _Rows:
  """Generated pairs by number."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> dict[str, Any]:
    images = {f"jpg_{k}": _image(2 * i + k) for k in (0, 1)}
    labels = {"label_0": float(i % 3 > 0), "label_1": float(i % 3 != 1)}
    return {"caption": f"caption {i // PER_CAPTION}", **images, **labels}


def _image(number: int) -> bytes:
  pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
  Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
  return file.getvalue()


def open_pairs(data: Any, tally: Any, kind: str) -> _Rows:
  """Opens as many rows as `data.path` says: this module is the data source."""
  del tally, kind
  return _Rows(int(data.path))


def _peaks() -> dict[str, float]:
  """Returns this process's memory in MiB."""
  status = Path("/proc/self/status").read_text(encoding="utf-8")
  kib = dict(re.findall(r"(VmHWM|RssAnon):\s+(\d+)", status))
  return {name: round(int(kib[name]) / 1024, 1) for name in ("VmHWM", "RssAnon")}


def build(rows: int, out: Path) -> dict[str, Any]:
  """Builds a set with two worker processes."""
  from jaxpref.data import build as build_lib

  began = time.perf_counter()
  plan = build_lib.Plan("data_memory", str(rows), table="pairs", rows_per_shard=2000)
  build_lib.build(plan, out, processes=2)
  worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
  return {"seconds": round(time.perf_counter() - began), "worker": round(worker, 1), **_peaks()}


def caches(out: Path) -> None:
  """Writes random encodings where the model's caches would be."""
  import jax.numpy as jnp

  from jaxpref.data import built_rows, cache
  from jaxpref.data.sources import built
  from jaxpref.models import load_pipeline

  pipeline = load_pipeline("shapes", dtype=jnp.float32)
  images = built_rows.StoredImages(built.open_set(str(out)), (pipeline.image_size,) * 2)
  tokens = pipeline.abstract_cond(1)["text"].shape[1:]
  shapes = {
    "latents": {name: (len(images), *pipeline.latent_shape) for name in ("latents", "std")},
    "text": {"text": (len(images.table.row_index.captions), *tokens)},
  }
  rng = np.random.default_rng(0)
  for kind, arrays in shapes.items():
    facts = cache.facts_of(images, kind, pipeline)
    where = cache.directory_of(images, kind, facts)
    where.mkdir(parents=True, exist_ok=True)
    for name, shape in arrays.items():
      array = np.lib.format.open_memmap(where / f"{name}.npy", "w+", "float16", shape)
      for start in range(0, shape[0], 10_000):
        part = array[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, np.float32)
      array.flush()
    record = {name: (list(shape), "float16") for name, shape in arrays.items()}
    (where / "complete.json").write_text(
      json.dumps({"facts": facts, "arrays": record}), encoding="utf-8"
    )


def batches(out: Path) -> dict[str, Any]:
  """Opens a set as a run does, shuffles it, and reads batches onto the device."""
  from jaxpref import config as config_lib
  from jaxpref.training import batch_maker, inputs, setup, train

  root = Path(__file__).parent.parent
  given = [f"--config={root}/configs/dpo.py", f"--config.data.path={out}"]
  given += ["--config.data.num_rows=0", f"--config.train.batch_size={BATCH}"]
  given += ["--config.data.cache=disk", "--config.data.latents=sample"]
  given += ["--config.evaluate.prompts=captions"]
  config, _ = config_lib.parse_args(given, flags={})
  began = time.perf_counter()
  prepared = setup.prepare(config)
  models = time.perf_counter() - began
  opened = inputs.open_rows(prepared)
  loader = train.make_loader(prepared, opened, batch_maker.BatchMaker(prepared, opened))
  next(loader)
  first = time.perf_counter() - began
  for _ in range(BATCHES - 1):
    next(loader)
  return {
    "rows": len(prepared.rows),
    "prepare_seconds": round(models, 1),
    "first_batch_seconds": round(first, 1),
    "batches_per_second": round((BATCHES - 1) / (time.perf_counter() - began - first), 1),
    **_peaks(),
  }


def _apart(name: str, *arguments: str) -> dict[str, Any]:
  """Runs a part of the measurement in a process of its own."""
  here, there = Path(__file__).parent, os.environ.get("PYTHONPATH", "")
  done = subprocess.run(
    [sys.executable, __file__, "--part", name, *arguments],
    env=os.environ | {"PYTHONPATH": f"{here}:{there}", "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    check=True,
    text=True,
    encoding="utf-8",
  )
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Measures each number of rows and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
  parser.add_argument("--sets", type=Path, default=Path("/tmp/jaxpref_data_memory"))
  parser.add_argument("--out", type=Path)
  parser.add_argument("--part", nargs="+")
  flags = parser.parse_args()
  if flags.part:
    name, *given = flags.part
    parts = {
      "build": lambda: build(int(given[0]), Path(given[1])),
      "caches": lambda: caches(Path(given[0])) or {},
      "batches": lambda: batches(Path(given[0])),
    }
    print(json.dumps(parts[name]()))
    return
  found: dict[str, Any] = {}
  for rows in flags.rows:
    out = flags.sets / str(rows)
    record = flags.sets / f"{rows}.json"
    if not record.exists():
      built = _apart("build", str(rows), str(out))
      _apart("caches", str(out))
      record.write_text(json.dumps(built), encoding="utf-8")
    found[str(rows)] = {
      "build": json.loads(record.read_text(encoding="utf-8")),
      "batches": _apart("batches", str(out)),
    }
    print(rows, json.dumps(found[str(rows)]), flush=True)
  least, most = str(min(flags.rows)), str(max(flags.rows))
  ratios = {
    part: {
      name: round(found[most][part][name] / found[least][part][name], 3)
      for name in ("VmHWM", "RssAnon", "worker")
      if name in found[most][part]
    }
    for part in ("build", "batches")
  }
  result = {
    "date": date.today().isoformat(),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "python": platform.python_version(),
    "batches": BATCHES,
    "batch_size": BATCH,
    "memory in MiB": found,
    "ratios": ratios,
  }
  print(json.dumps(ratios))
  if flags.out:
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
