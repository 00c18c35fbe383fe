"""What the timings share: our programs as a run would build them, rivals, and taking turns.

Contenders take turns, so that a machine that is shared or throttled is so for all of them
alike; what is reported are medians, and ratios to ours within a turn.
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
from jaxpref.runtime import jax_setup, throughput
from jaxpref.training import flops, programs, setup

BUNDLED = Path("jaxpref/pipelines/shapes")
RIVALS = {
  "P0": "PyTorch as the published loop has it: eager, diffusers' and PyTorch's defaults, a "
  "solver that loops over samples in Python, a call for each half and model",
  "P1": "PyTorch made fast: SDPA, channels_last, one call for all of a batch, a vectorised "
  "solver, fused optimizer",
  "P2": "P1 with torch.compile",
}


def make_parser(description: str, *, method: str, rows: int) -> argparse.ArgumentParser:
  """Options that all timings have."""
  parser = argparse.ArgumentParser(
    description=description.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--model", type=Path, default=BUNDLED, help="a pipeline's directory; weights are drawn")
  add("--width", type=int, help="channels of its first level; by default as it has them")
  add("--latents", type=int, help="their height; by default as the model has them")
  add("--config", default=f"configs/{method}.py:shapes", help="what ours does")
  add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="in that configuration")
  add("--rows", type=int, default=rows, help="of an update or of a batch")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
  add("--against", default="", choices=("", "torch"), help="time rivals as well")
  add("--rivals", nargs="+", default=["P0", "P1"], choices=RIVALS)
  add("--turns", type=int, default=7, help="of each contender, after one that compiles")
  add(
    "--apart",
    action="store_true",
    help="each contender in a process of its own, one after the other: for a device "
    "whose memory does not hold them together",
  )
  add("--only", help=argparse.SUPPRESS)  # what such a process times, for its caller
  add("--out", type=Path, help="JSON file for the numbers; a table is printed anyway")
  return parser


def checked_of(options: argparse.Namespace, *fields: str) -> setup.Checked:
  """A run's configuration and models as the options want it, without weights."""
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
  """Writes the model's configuration files as a pipeline has them, narrower if asked for.

  They may also stand side by side, as unet.json, vae.json, and so on.
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
  """Arrays of these shapes, placed as they say: normal numbers of a layer's usual size."""
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
  """A run's programs, and arguments of random numbers."""
  program, shapes = programs.abstract_programs(checked)
  params = realise(shapes.state.params)
  state = jax.jit(program.make_state, out_shardings=program.placement)(params)
  return program, realise(shapes._replace(state=None))._replace(state=state)


def update_of(checked: setup.Checked) -> Callable[[], None]:
  """One update of a run with random numbers, and what it draws for it."""
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
  """Seconds of a call, by contender and turn.

  Args:
    contenders: by name; each returns when its work is done.
    turns: of each.
    at_least: seconds of a turn, which is as many calls as that takes: what a call costs in
      a loop, not one after another's, whose threads may still spin and whose data fill
      the caches.
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
  """Builds contenders and times them, as `take_turns` does, or with `--apart` one by one.

  Args:
    makers: by name what builds a contender.
    options: from `make_parser`.

  Returns:
    Seconds of a call, by contender and turn; without those whose process failed.
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
    sys.exit("there is nothing to compare with")
  return took


def time_updates(
  runs: Mapping[str, setup.Checked], turns: int, base_of: Callable[[str], str]
) -> dict[str, dict[str, float]]:
  """Times an update of each run, in turns, and prints a table.

  Args:
    runs: by name.
    turns: of each.
    base_of: from a run's name that of the one it is compared with.

  Returns:
    By name 'seconds' (median), and 'time' (median of ratios within a turn) and 'FLOPs', by the
    method's count, over those of its base.
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
  """FLOP/s that one device reaches in large products of square matrices of random numbers."""
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
  """Prints a table, and writes everything as JSON where it is wanted.

  Args:
    name: of the benchmark.
    options: from `make_parser`.
    took: from `time_contenders`; 'ours' is what others are compared with.
    unit: what a call makes, such as 'images'.
    units: how many.
    work: FLOPs of a call, by the method's count; of each contender where they differ.
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
  """What builds PyTorch's contenders, by kind, where they are asked for.

  Args:
    options: from `make_parser`.
    checked: ours, whose UNet they have.
    contender_of: from a `rivals.Rival` what it does.
  """
  config = {k: v for k, v in checked.pipeline.configs["unet"].items() if k[0] != "_"}
  tokens = checked.pipeline.modules["text_encoder"].config.max_position_embeddings

  def make(kind: str) -> Callable[[], None]:
    import rivals  # PyTorch is not needed for ours alone

    return contender_of(
      rivals.Rival(config, kind, rows=options.rows, dtype=options.dtype, tokens=tokens)
    )

  kinds = options.rivals if options.against else []
  return {kind: functools.partial(make, kind) for kind in kinds}


def rows_placed(checked: setup.Checked, tree: Any) -> Any:
  """Arrays of a batch on the devices."""
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
