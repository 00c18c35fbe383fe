"""Shared parts of the timings: programs as a run builds them, rivals, and taking turns.

Contenders take turns, so that the load and the throttling of a machine affect all of them
equally. Reported are medians, and ratios to jaxpref's time within a turn.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpref import config as config_lib
from jaxpref import sharding
from jaxpref.base_config import DTYPES
from jaxpref.runtime import jax_setup, throughput
from jaxpref.training import flops, programs, setup

BUNDLED = Path("jaxpref/pipelines/shapes")
RIVALS = {
  "P0": "PyTorch as in the published loop: eager, diffusers' and PyTorch's defaults, a solver "
  "that loops over samples in Python, one call per half and model",
  "P1": "PyTorch made fast: SDPA, channels_last, one call for a whole batch, a vectorised "
  "solver, fused optimizer",
  "P2": "P1 with torch.compile",
}


def make_parser(description: str, *, method: str, rows: int) -> argparse.ArgumentParser:
  """Makes a parser with the options of all timings."""
  parser = argparse.ArgumentParser(
    description=description.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", type=Path, default=BUNDLED, help="a pipeline's directory; weights are random")
  add("--width", type=int, help="channels of the UNet's first level; default: the model's")
  add("--latents", type=int, help="height of latents; default: the model's")
  add("--config", default=f"configs/{method}.py:shapes", help="jaxpref's configuration")
  add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields to set in it")
  add("--rows", type=int, default=rows, help="batch size")
  add("--dtype", default="float32", choices=DTYPES, help="computation dtype")
  add("--against", default="", choices=("", "torch"), help="time rivals as well")
  add("--rivals", nargs="+", default=["P0", "P1"], choices=RIVALS)
  add("--turns", type=int, default=7, help="turns per contender, after one that compiles")
  add(
    "--apart",
    action="store_true",
    help="run each contender in its own process, one after the other, for devices with too "
    "little memory for all of them",
  )
  add("--only", help=argparse.SUPPRESS)  # the contender of such a process
  add("--out", type=Path, help="JSON file for the numbers; a table is always printed")
  return parser


def checked_of(options: argparse.Namespace, *fields: str) -> setup.Checked:
  """Returns the configuration and models that the options ask for, without weights."""
  jax_setup.use_all_cores()
  with tempfile.TemporaryDirectory() as directory:
    model = lay_out(options, Path(directory))
    settings = (
      f"model.path={model}",
      f"model.dtype={options.dtype}",
      f"model.frozen_dtype={options.dtype}",
      f"train.batch_size={options.rows}",
      *fields,
      *options.set,
    )
    arguments = [f"--config={options.config}", *(f"--config.{field}" for field in settings)]
    config, _ = config_lib.parse_args(arguments, flags={})
    config_lib.validate(config)
    if "iterate" in config:  # an update of one iteration
      with config.unlocked():
        del config.iterate
    return setup.check(config, mesh=sharding.make_mesh())


def lay_out(options: argparse.Namespace, directory: Path) -> Path:
  """Writes the model's configuration files in a pipeline's layout, narrower if asked for.

  The source may also have them in one folder, as unet.json, vae.json, and so on.
  """
  files = {f.stem: f for f in options.model.glob("*.json")}
  files |= {f.parent.name: f for f in options.model.glob("*/*config.json")}
  configs = {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items()}
  unet = configs["unet"]
  if options.latents:
    unet["sample_size"] = options.latents
  if options.width:
    first = unet["block_out_channels"][0]
    unet["block_out_channels"] = [
      options.width * channels // first for channels in unet["block_out_channels"]
    ]
    unet["cross_attention_dim"] = 2 * options.width
    configs["text_encoder"] |= {"hidden_size": 2 * options.width, "num_attention_heads": 4}
  places = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
  for name, config in configs.items():
    target = directory / places.get(name, f"{name}/config.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(config), encoding="utf-8")
  return directory


def realise(shapes: Any, *, seed: int = 0) -> Any:
  """Makes random arrays of these shapes and shardings, with a layer's usual scale."""
  numbers = iter(range(len(jax.tree.leaves(shapes))))

  def one(leaf):
    rng = np.random.default_rng([seed, next(numbers)])
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25.0
    values = rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(max(fan, 1.0)))
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(one, shapes)


def realise_run(checked: setup.Checked) -> tuple[programs.Programs, programs.Arguments]:
  """Returns a run's programs and random arguments for them."""
  program, shapes = programs.abstract_programs(checked)
  params = realise(shapes.state.params)
  state = jax.jit(program.make_state, out_shardings=program.placement)(params)
  return program, realise(shapes._replace(state=None))._replace(state=state)


def update_of(checked: setup.Checked) -> Callable[[], None]:
  """Returns a function that makes one update of a run, with its rollout, on random numbers."""
  program, inputs = realise_run(checked)
  state = [inputs.state]

  def update() -> None:
    now, drawn = state[0], None
    if program.rollout:
      drawn = program.rollout(
        *programs.rollout_arguments(
          program, now, inputs.base, inputs.batch["cond"], inputs.uncond
        )
      )
    state[0], values = program.train_step(
      now, inputs.base, inputs.uncond, inputs.batch, drawn, inputs.start
    )
    jax.block_until_ready(values)

  return update


def take_turns(
  contenders: Mapping[str, Callable[[], None]], turns: int, *, at_least: float = 0.5
) -> dict[str, list[float]]:
  """Times contenders in turns; returns seconds per call, by contender and turn.

  Args:
    contenders: by name; each returns when its work is done.
    turns: number of turns of each.
    at_least: minimum seconds of a turn, which repeats the call until then. This measures a
      call in a loop. A single call after another contender's would include the effects of its
      threads, which may still spin, and of its data in the caches.
  """
  took: dict[str, list[float]] = {name: [] for name in contenders}
  for name, run in contenders.items():
    began = time.perf_counter()
    run()
    print(f"{name}: first call {time.perf_counter() - began:.1f} s", flush=True)
  for _ in range(turns):
    for name, run in contenders.items():
      calls, elapsed, began = 0, 0.0, time.perf_counter()
      while elapsed < at_least:
        run()
        calls, elapsed = calls + 1, time.perf_counter() - began
      took[name].append(elapsed / calls)
  print(", ".join(f"{name} {statistics.median(took[name]):.4g} s" for name in took), flush=True)
  return took


def time_contenders(
  makers: Mapping[str, Callable[[], Callable[[], None]]], options: argparse.Namespace
) -> dict[str, list[float]]:
  """Builds contenders and times them, with `take_turns`, or with `--apart` one by one.

  Args:
    makers: by name, functions that build a contender.
    options: from `make_parser`.

  Returns:
    Seconds per call, by contender and turn, without contenders whose process failed.
  """
  if options.only:
    name = options.only
    took = take_turns({name: makers[name]()}, options.turns)
    options.out.write_text(json.dumps(took[name]), encoding="utf-8")
    sys.exit()
  if not options.apart:
    return take_turns({name: make() for name, make in makers.items()}, options.turns)
  took = {}
  with tempfile.TemporaryDirectory() as directory:
    for name in makers:
      out = Path(directory, "seconds.json")
      command = [sys.executable, *sys.argv, f"--only={name}", f"--out={out}"]
      if subprocess.run(command, check=False).returncode == 0:
        took[name] = json.loads(out.read_text(encoding="utf-8"))
      else:
        print(f"{name}: failed, and is left out")
  if "ours" not in took:
    sys.exit("jaxpref's own contender failed: nothing to compare with")
  return took


def time_updates(
  runs: Mapping[str, setup.Checked], turns: int, base_of: Callable[[str], str]
) -> dict[str, dict[str, float]]:
  """Times an update of each run, in turns, and prints a table.

  Args:
    runs: by name.
    turns: number of turns of each.
    base_of: maps a run's name to that of the run it is compared with.

  Returns:
    By name: 'seconds' (median), and relative to the base 'time' (median of ratios within a
    turn) and 'FLOPs' (by the method's count).
  """
  works = {
    name: sum(flops.of_update(checked, flops.of_forward(checked.pipeline)).values())
    for name, checked in runs.items()
  }
  took = take_turns({name: update_of(checked) for name, checked in runs.items()}, turns)
  found = {}
  print("| | ms | time | FLOPs |\n|---|---|---|---|")
  for name, times in took.items():
    base = base_of(name)
    found[name] = {
      "seconds": statistics.median(times),
      "time": statistics.median(a / b for a, b in zip(times, took[base], strict=True)),
      "FLOPs": works[name] / works[base],
    }
    seconds, time_ratio, work = found[name].values()
    print(f"| {name} | {1000 * seconds:.0f} | {time_ratio:.2f} | {work:.2f} |")
  return found


def matmul_rate(dtype: str) -> float:
  """Measures one device's FLOP/s in large products of random square matrices."""
  size, calls = (1024, 1) if jax.default_backend() == "cpu" else (8192, 10)
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  in_a_row = lambda: jax.block_until_ready([product(a) for _ in range(calls)])  # noqa: E731
  return 2 * size**3 * calls / min(_timed(in_a_row) for _ in range(5))


def report(
  name: str,
  options: argparse.Namespace,
  took: Mapping[str, list[float]],
  *,
  unit: str,
  units: int,
  work: float | Mapping[str, float],
) -> None:
  """Prints a table, and writes all numbers as JSON if `--out` is given.

  Args:
    name: of the benchmark.
    options: from `make_parser`.
    took: from `time_contenders`; the others are compared with 'ours'.
    unit: what a call makes, such as 'images'.
    units: number of them per call.
    work: FLOPs per call, by the method's count; by contender if they differ.
  """
  works = dict(work) if isinstance(work, Mapping) else dict.fromkeys(took, work)
  device = jax.devices()[0]
  rate = matmul_rate(options.dtype) * jax.device_count()
  numbers: dict[str, Any] = {
    "benchmark": name,
    "date": str(datetime.date.today()),
    "devices": f"{jax.device_count()} x {device.device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "versions": {p: _version(p) for p in ("jax", "jaxlib", "diffusers", "torch")},
    "options": {k: str(v) for k, v in vars(options).items()},
    "flops of a call": works,
    "flops a second of a large product": rate,
    "peak of the data sheet": throughput.peak_of(device.device_kind),
    "contenders": {},
  }
  print(f"\n{numbers['devices']}, {numbers['machine']}, {numbers['versions']}")
  print(f"\n| {name} | {unit} a second | time / ours | share of a large product's FLOP/s |")
  print("|---|---|---|---|")
  for contender, times in took.items():
    median = statistics.median(times)
    ratio = statistics.median(
      mine / ours for mine, ours in zip(times, took["ours"], strict=True)
    )
    share = works[contender] / median / rate
    numbers["contenders"][contender] = {
      "seconds": times,
      "median": median,
      f"{unit} a second": units / median,
      "time / ours": ratio,
      "share of product": share,
    }
    print(f"| {contender} | {units / median:.2f} | {ratio:.2f} | {100 * share:.1f} % |")
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def rival_makers(
  options: argparse.Namespace,
  checked: setup.Checked,
  contender_of: Callable[[Any], Callable[[], None]],
) -> dict[str, Callable[[], Callable[[], None]]]:
  """Returns builders of PyTorch's contenders by kind, if they are asked for.

  Args:
    options: from `make_parser`.
    checked: jaxpref's run, whose UNet they use.
    contender_of: maps a `rivals.Rival` to the function to time.
  """
  config = {k: v for k, v in checked.pipeline.configs["unet"].items() if k[0] != "_"}
  tokens = checked.pipeline.modules["text_encoder"].config.max_position_embeddings

  def make(kind: str) -> Callable[[], None]:
    import rivals  # late, because jaxpref's contender does not need PyTorch

    return contender_of(
      rivals.Rival(config, kind, rows=options.rows, dtype=options.dtype, tokens=tokens)
    )

  kinds = options.rivals if options.against else []
  return {kind: functools.partial(make, kind) for kind in kinds}


def rows_placed(checked: setup.Checked, tree: Any) -> Any:
  """Puts arrays of a batch on the devices."""
  return jax.device_put(tree, sharding.batch_sharding(checked.mesh))


def _timed(run: Callable[[], Any]) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ""
