"""Measures how fast images and cached latents come from disk, against other loaders.

  python benchmarks/data_speed.py --out docs/data/speed.json

JPEG pairs of 640 x 512 pixels are decoded, cropped and resized to 512 x 512, in shuffled
batches, by

  jaxpref: a built data set, as a run without a cache reads it
  torch: a DataLoader over a parquet file, with Pillow
  datasets: a DataLoader over Hugging Face's `datasets` of the same file, with Pillow

and batches of cached latents are read as a run with a cache reads them. The loaders take turns,
`--rounds` times, on as many workers as there are cores; the medians are reported. PyTorch and
`datasets` are only needed for their part: without them it is left out.

Then runs of DPO on a built set of the shapes world, with each choice of `data.cache`, tell what
share of an update they wait for data.
"""

import argparse
import importlib.util
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jaxpref import base_config, sharding
from jaxpref import main as main_lib
from jaxpref.data import build, encode, gather, loader
from jaxpref.data import rows as rows_lib

SIZE, BATCH = 512, 16
LATENT = (4, 64, 64)  # of Stable Diffusion


def write_parquet(path: Path, rows: int) -> None:
  """Writes pairs of smooth random images, whose files are as large as photographs'."""
  schema = pa.schema(
    [
      *(("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary())),
      *(("label_0", pa.float32()), ("label_1", pa.float32())),
    ]
  )
  with pq.ParquetWriter(path, schema) as writer:
    for start in range(0, rows, 50):
      numbers = range(start, min(start + 50, rows))
      columns: dict[str, list[Any]] = {
        "caption": [f"caption {i}" for i in numbers],
        **{f"jpg_{k}": [photograph(2 * i + k) for i in numbers] for k in (0, 1)},
        **{f"label_{k}": [float(i % 2 == k) for i in numbers] for k in (0, 1)},
      }
      writer.write_table(pa.table(columns, schema=schema))


def photograph(number: int) -> bytes:
  """Returns a JPEG file of 640 x 512 pixels, of about 80 kilobytes."""
  rng = np.random.default_rng(number)
  layers = np.zeros((512, 640, 3), np.float32)
  for step in (2, 8, 64):
    small = rng.integers(0, 256, (512 // step, 640 // step, 3), np.uint8)
    scaled = Image.fromarray(small).resize((640, 512), Image.Resampling.BICUBIC)
    layers += np.asarray(scaled, np.float32) * {2: 0.2, 8: 0.3, 64: 0.5}[step]
  Image.fromarray(layers.astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=85)
  return file.getvalue()


def from_jaxpref(directory: Path) -> Iterator[Any]:
  """Yields batches on the device, uint8 [B, 2, 512, 512, 3]."""
  data = base_config.base("dpo", "tiny").data
  data.update({"path": str(directory), "num_rows": 0})
  rows = rows_lib.load_rows("pairs", data, image_size=SIZE, seed=0)
  images = encode.read_images(rows.images, np.arange(len(rows.images)), flip=False)
  leaf, mesh = gather.Gather(images, rows.image), sharding.make_mesh()
  read = lambda _, index: sharding.place_batch(leaf, mesh, index)  # noqa: E731
  yield from loader.make_loader(len(rows), batch_size=BATCH, seed=0, read=read, ahead=2)


def _decode(content: bytes | Image.Image) -> np.ndarray:
  image = Image.open(io.BytesIO(content)) if isinstance(content, bytes) else content
  image = image.convert("RGB")
  side = min(image.size)
  left, top = ((length - side) // 2 for length in image.size)
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


class _Parquet:
  """A PyTorch data set over a parquet file that is mapped into memory."""

  def __init__(self, path: Path):
    self._path = str(path)
    self._rows = pq.read_metadata(path).num_rows
    self._table: Any = None

  def __len__(self) -> int:
    return self._rows

  def __getitem__(self, i: int) -> np.ndarray:
    if self._table is None:
      self._table = pq.read_table(self._path, memory_map=True)
    return np.stack([_decode(self._table[f"jpg_{k}"][i].as_py()) for k in (0, 1)])


class _HuggingFace:
  """A PyTorch data set over Hugging Face's `datasets`."""

  def __init__(self, path: Path, cache: Path):
    import datasets

    self._rows = datasets.load_dataset(
      "parquet", data_files=str(path), split="train", cache_dir=str(cache)
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> np.ndarray:
    row = self._rows[i]
    return np.stack([_decode(row[f"jpg_{k}"]) for k in (0, 1)])


def from_torch(dataset: Any) -> Iterator[Any]:
  """Yields batches of a PyTorch DataLoader, uint8 [B, 2, 512, 512, 3]."""
  import torch

  while True:
    yield from torch.utils.data.DataLoader(
      dataset,
      batch_size=BATCH,
      shuffle=True,
      num_workers=os.cpu_count() or 1,
      persistent_workers=False,
      generator=torch.Generator().manual_seed(0),
      multiprocessing_context="fork",
    )


def from_cache(directory: Path, rows: int) -> Iterator[Any]:
  """Yields batches of cached latents on the device, as they are read from a map of a file."""
  where = directory / "latents.npy"
  if not where.exists():
    array = np.lib.format.open_memmap(where, "w+", "float16", (2 * rows, *LATENT))
    array[:] = np.random.default_rng(0).standard_normal(array.shape, np.float32)
    array.flush()
  values = np.load(where, mmap_mode="r")
  leaf = gather.Gather(values, np.arange(2 * rows).reshape(rows, 2), np.float32)
  mesh = sharding.make_mesh()
  read = lambda _, index: sharding.place_batch(leaf, mesh, index)  # noqa: E731
  yield from loader.make_loader(rows, batch_size=BATCH, seed=0, read=read, ahead=2)


def rate(batches: Iterator[Any], count: int) -> float:
  """Returns the images per second of `count` batches, after one that starts the workers."""
  jax.block_until_ready(next(batches))
  began = time.perf_counter()
  for _ in range(count):
    jax.block_until_ready(next(batches))
  return 2 * BATCH * count / (time.perf_counter() - began)


def shares_of_waiting(root: Path, updates: int) -> dict[str, float]:
  """Returns the median share of an update that runs wait for their batch, by `data.cache`."""
  plan = build.Plan("shapes", "", table="pairs")
  build.build(plan, root / "shapes", processes=os.cpu_count() or 1)
  found = {}
  for where in ("memory", "disk", "ahead"):
    workdir = root / f"run_{where}"
    given = [f"--config={Path(__file__).parent.parent}/configs/dpo.py", f"--workdir={workdir}"]
    fields = {"data.path": root / "shapes", "data.cache": where, "train.num_updates": updates}
    fields |= {"data.num_rows": 0, "train.log_every": 1, "evaluate.num_prompts": 1}
    given += [f"--config.{name}={value}" for name, value in fields.items()]
    if main_lib.main(given):
      raise SystemExit(f"the run with data.cache={where} failed")
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[2:]
    times = [{k: v for k, v in json.loads(x).items() if k.startswith("time/")} for x in lines]
    shares = [of["time/data"] / sum(of.values()) for of in times]
    found[where] = round(statistics.median(shares), 4)
  return found


def main() -> None:
  """Measures all loaders and prints the medians."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=600)
  parser.add_argument("--batches", type=int, default=20)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--updates", type=int, default=12, help="of the runs")
  parser.add_argument("--out", type=Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    root = Path(folder)
    parquet = root / "pairs.parquet"
    write_parquet(parquet, flags.rows)
    plan = build.Plan("pickapic", str(parquet), table="pairs")
    began = time.perf_counter()
    build.build(plan, root / "set", processes=os.cpu_count() or 1)
    built = 2 * flags.rows / (time.perf_counter() - began)
    loaders: dict[str, Callable[[], Iterator[Any]]] = {
      "jaxpref": lambda: from_jaxpref(root / "set"),
      "jaxpref, cached latents": lambda: from_cache(root, flags.rows),
    }
    if importlib.util.find_spec("torch"):
      loaders["torch"] = lambda: from_torch(_Parquet(parquet))
      if importlib.util.find_spec("datasets"):
        loaders["datasets"] = lambda: from_torch(_HuggingFace(parquet, root / "hf"))
    found: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(flags.rounds):
      for name, make in loaders.items():
        found[name].append(rate(make(), flags.batches))
    waiting = shares_of_waiting(root, flags.updates)
    kilobytes = parquet.stat().st_size / flags.rows / 2000
  medians = {name: round(statistics.median(of), 1) for name, of in found.items()}
  names = ("jax", "grain", "pyarrow", "PIL", "torch", "datasets")
  there = {n: "pillow" if n == "PIL" else n for n in names if importlib.util.find_spec(n)}
  rival = medians.get("torch", float("nan"))
  result = {
    "date": date.today().isoformat(),
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "python": platform.python_version(),
    "versions": {package: metadata.version(package) for package in there.values()},
    "kilobytes of a JPEG": round(kilobytes, 1),
    "images per second": medians,
    "of torch": {name: round(median / rival, 2) for name, median in medians.items()},
    "all rounds": {name: [round(x, 1) for x in of] for name, of in found.items()},
    "images per second of the build": round(built, 1),
    "share of an update spent waiting for data": waiting,
  }
  print(json.dumps(result, indent=1))
  if flags.out:
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
