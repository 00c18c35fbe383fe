"""Estimates of a run's cost, before devices are rented.

  python -m jaxpref.plan --config=configs/dro.py:sd15 --topology=v5e:4x4

It counts parameters, FLOPs per update by phase, and memory per device. It says whether the run
fits, and which settings make it fit. For TPUs, if libtpu is installed, --compile=yes compiles
the run's programs with the TPU compiler, for its own numbers of memory and communication. The
planner needs no accelerator, and only the configuration files of the model; of scorers inside
of the program (`draft`, `refl`, `spo`, `step_reward`) it reads the weights.
"""

import dataclasses
import datetime
import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxpref import config as config_lib
from jaxpref.base_config import REMAT
from jaxpref.errors import UserError
from jaxpref.plan.tpu_compiler import GIB, compile_programs, describe_compiled
from jaxpref.runtime import cli
from jaxpref.runtime import workdir as workdir_lib
from jaxpref.runtime.paths import number_of

FLAGS = {
  "topology": "devices to plan for, such as v5e:4x4, v5p:2x2x2, h200:8",
  "mfu": "model FLOPs utilization, the share of the devices' peak; 0.4 by default",
  "compile": "'yes' compiles for TPUs (minutes to tens of minutes); 'no' by default",
  "json": "a file to write the numbers to",
}
_MOST_DEVICES = 65_536
_USABLE = 0.9  # share of a device's memory; the estimate does not include scratch space


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device: JAX's name for it, its memory in GiB, and JAX's name of its platform."""

  kind: str
  memory: float
  platform: str = "gpu"


CHIPS = {
  "v4": Chip("TPU v4", 32, "tpu"),
  "v5e": Chip("TPU v5 lite", 16, "tpu"),
  "v5p": Chip("TPU v5", 95, "tpu"),
  "v6e": Chip("TPU v6 lite", 32, "tpu"),
  "a100": Chip("NVIDIA A100", 80),
  "h100": Chip("NVIDIA H100", 80),
  "h200": Chip("NVIDIA H200", 141),
}


def main(argv: list[str]) -> int:
  """Prints and writes the plan that the flags ask for; returns the exit status."""
  # Before JAX starts, because libtpu would otherwise look for a TPU.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may hold the TPU
  return cli.exit_status(_run, argv, resumable=False)


def _run(argv: list[str]) -> None:
  config, flags = config_lib.parse_args(argv, flags=FLAGS)
  config_lib.validate(config)
  compiles = flags.get("compile", "no")
  if compiles not in ("yes", "no"):
    raise UserError(f"--compile must be 'yes' or 'no' (got {compiles!r})")
  try:
    mfu = float(flags.get("mfu", 0.4))
  except ValueError:
    mfu = 0.0
  if not 0 < mfu <= 1:
    raise UserError(f"--mfu must be above 0 and at most 1 (got {flags['mfu']!r})")
  if "topology" not in flags:
    raise UserError("--topology is missing: set it, for example --topology=v5e:4x4")
  chip, _ = parse_topology(flags["topology"])
  if compiles == "yes" and chip.platform != "tpu":
    raise UserError("--compile=yes works only for TPUs: leave it out")
  if "json" in flags and (not flags["json"] or Path(flags["json"]).is_dir()):
    raise UserError(f"--json must be a file to write (got {flags['json']!r})")
  if "model" not in config or "loss" not in config:
    raise UserError(
      f"{config.name} cannot be planned: it does not train with a preference loss"
    )
  numbers = plan(config, flags["topology"], mfu=mfu)
  print(describe(numbers), flush=True)
  if compiles == "yes":
    numbers["compiled"] = compile_programs(
      _for_accelerator(config, traced_only=False), flags["topology"]
    )
    print("\n".join(describe_compiled(numbers["compiled"])))
  if "json" in flags:
    workdir_lib.write_json(Path(flags["json"]), numbers)


def parse_topology(text: str) -> tuple[Chip, int]:
  """Parses a topology into the kind of device and the number of devices.

  Args:
    text: such as 'v5e:4x4', which is sixteen devices.

  Raises:
    UserError: the kind is unknown, or the number is missing or too large.
  """
  name, _, shape = text.partition(":")
  if name not in CHIPS:
    raise UserError(f"--topology: {name!r} is not one of {', '.join(CHIPS)}")
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise UserError(f"--topology: {text!r} lacks a number of devices, such as {name}:8")
  sides = [number_of(side) or _MOST_DEVICES + 1 for side in shape.split("x")]
  if (count := math.prod(sides)) > _MOST_DEVICES:
    raise UserError(f"--topology: {text!r} has more than {_MOST_DEVICES:,} devices")
  return CHIPS[name], count


def _settings(config: ConfigDict) -> dict[str, Any]:
  """Returns the settings that influence the numbers most."""
  fields = dict(config_lib.leaves(config))
  names = ("model.dtype", "model.attention", "model.norm", "model.remat", "lora.rank")
  more = ("train.batch_size", "train.accumulate", "rollout.batch_size", "rollout.num_steps")
  return {name: fields[name] for name in (*names, *more) if name in fields}


def plan(
  config: ConfigDict, topology: str, *, mfu: float = 0.4, search: bool = True
) -> dict[str, Any]:
  """Estimates everything that follows from shapes.

  Args:
    config: the run's configuration.
    topology: see `parse_topology`.
    mfu: model FLOPs utilization for the estimate of time, 0 to 1.
    search: whether to look for other settings that fit.

  Returns:
    A tree of numbers and texts: 'devices', 'parameters', 'flops' of an update by phase,
    'seconds' of an update and 'hours' of all updates at this MFU, 'memory' of a device in GiB
    with the configured settings ('configuration'), and under 'settings' what else fits, by
    'mesh.fsdp' and 'model.remat'.

  Raises:
    UserError: the configuration or the topology is invalid.
  """
  import jax  # noqa: PLC0415  # late, so that errors on the command line do not wait for JAX
  import numpy as np  # noqa: PLC0415

  from jaxpref import sharding  # noqa: PLC0415
  from jaxpref.runtime import throughput  # noqa: PLC0415
  from jaxpref.training import flops, programs, setup  # noqa: PLC0415

  chip, count = parse_topology(topology)
  iterations = config.iterate.num_iterations if "iterate" in config else 1
  configured = _settings(config)
  config = _for_accelerator(config)
  checked = setup.check(config, mesh=sharding.abstract_mesh(config.mesh, count))
  _, arguments = programs.abstract_programs(checked)
  model = _Model(checked, chip)
  forward = flops.of_forward(checked.pipeline)
  work = flops.of_update(checked, forward)
  seconds = sum(work.values()) / count / (mfu * (throughput.peak_of(chip.kind) or 1.0))
  size = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))  # noqa: E731
  found = {
    "config": f"{config.name}:{config.preset}",
    "model": config.model.path,
    "topology": topology,
    "devices": count,
    "mesh": dict(checked.mesh.shape),
    "configuration": configured,
    "made": {"date": datetime.date.today().isoformat(), "jax": jax.__version__},
    "parameters": size(checked.pipeline.abstract_denoiser()),
    "trained": size(arguments.state.params),
    "forward": forward,
    "flops": work,
    "mfu": mfu,
    "seconds": seconds,
    "hours": seconds * config.train.num_updates * iterations / 3600,
    "device": {"kind": chip.kind, "memory": float(chip.memory)},
    "memory": _memory(checked, arguments, model),
  }
  found["fits"] = found["memory"]["total"] <= _USABLE * chip.memory
  found["settings"] = list(_search(checked, arguments, model, chip)) if search else []
  return found


class _Model:
  """Shapes, and bytes stored under each remat; traced once, for all settings."""

  def __init__(self, checked: Any, chip: Chip):
    import jax  # noqa: PLC0415

    from jaxpref.models.pipeline import abstract_params  # noqa: PLC0415
    from jaxpref.plan import memory  # noqa: PLC0415

    pipeline, dtype = checked.pipeline, checked.config.model.frozen_dtype
    params = {part: abstract_params(module) for part, module in pipeline.modules.items()}
    denoiser = params.pop(pipeline.family.denoiser)
    self.base = jax.eval_shape(lambda p: pipeline.freeze(p, dtype), denoiser)
    self.encoders = params
    self.fused = _has_fused_attention(checked, chip)
    self.judge = memory.judge_shapes(checked)
    self._checked = checked
    self._kept: dict[str, int] = {}

  def kept(self, remat: str) -> int:
    """Returns the bytes that one latent's forward pass stores for the backward pass."""
    from jaxpref.plan import memory  # noqa: PLC0415

    # Fused attention stores about as little as recomputed attention.
    remade = "attention" if remat == "none" and self.fused else remat
    if remade not in self._kept:
      config, pipeline = self._checked.config, self._checked.pipeline
      options: dict[str, Any] = {"attention": "xla", "norm": "lean", "remat": remade}
      if "judge" in config:
        width = config.judge.width
        found = memory.kept_by_reward_model(pipeline, width=width, **options)
      else:
        found = memory.kept_bytes(pipeline, **options)
      self._kept[remade] = found
    return self._kept[remade]

  @functools.cached_property
  def kept_by_step_reward(self) -> tuple[int, int]:
    """Returns the bytes that a step-aware preference model stores, by `plan.memory`."""
    from jaxpref.plan import memory  # noqa: PLC0415

    return memory.kept_by_step_reward(self._checked.pipeline)

  @functools.cached_property
  def kept_by_judge(self) -> int:
    """Returns those of decoder and scorers, for an image of an update that samples."""
    from jaxpref.plan import memory  # noqa: PLC0415
    from jaxpref.training import programs  # noqa: PLC0415

    judge, batch = self._checked.judge, programs.abstract_prompts(self._checked, 1)
    return memory.kept_by_judge(judge, self._checked.pipeline, batch["rows"]["tokens"])


def _has_fused_attention(checked: Any, chip: Chip) -> bool:
  """Returns whether the longest attention stores no logits: bfloat16 on GPUs, any on TPUs."""
  from jaxpref.models import kernels  # noqa: PLC0415

  if chip.platform == "gpu":
    return checked.config.model.dtype == "bfloat16"
  return kernels.is_long(max((n for _, n in checked.pipeline.attentions()), default=0))


def _for_accelerator(config: ConfigDict, *, traced_only: bool = True) -> Any:
  """Returns the configuration for the accelerator, without what only reads files.

  Args:
    config: the run's configuration.
    traced_only: whether programs are only traced; if not, they are compiled for TPUs and get
      the kernels that run there.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    if config.model.attention != "stock" and traced_only:
      # cuDNN's attention cannot be traced without a GPU.
      config.model.attention = "xla"
    elif config.model.attention == "auto":
      config.model.attention = "splash"
    config.model.norm = "stock" if config.model.norm == "stock" else "lean"
    if "iterate" in config:
      # All iterations but the first start from the weights of the previous one.
      config.model.start = config.model.start or "the previous iteration"
      del config.iterate
  return config


def _logits_bytes(checked: Any) -> int:
  """Returns the bytes of XLA's largest attention, per latent: float32 logits and softmax."""
  width = 4 + (2 if checked.config.model.dtype == "bfloat16" else 4)
  sizes = checked.pipeline.attentions()
  return max((heads * tokens**2 * width for heads, tokens in sizes), default=0)


def _memory(checked: Any, arguments: Any, model: _Model) -> dict[str, float]:
  """Estimates a device's memory in GiB, by use.

  Args:
    checked: the run, whose mesh and settings are used.
    arguments: abstract arguments of the programs; their global shapes do not depend on the
      mesh.
    model: of the run.
  """
  from jaxpref.plan import memory  # noqa: PLC0415
  from jaxpref.training import programs, step_rows  # noqa: PLC0415

  config, mesh, state = checked.config, checked.mesh, arguments.state
  on = lambda tree: memory.bytes_on_device(tree, mesh)  # noqa: E731
  arms = len(checked.arms) - programs.has_own_targets(checked)
  states = config.rollout.states if checked.loss.needs.rollout else 1
  images = config.train.batch_size / config.train.accumulate / mesh.size
  samples = "pathwise" in config  # and has no arms: an update makes its own images
  latents = images * (1 if samples else states * arms)
  if (config.rollout.guidance if samples else step_rows.training_guidance(config)) > 1:
    latents *= 2
  batch, decoder = arguments.batch, 0
  if checked.pipeline.scorer:  # the denoiser has no backward pass, and every device a decoder
    image, recomputed = model.kept_by_step_reward
    scored = images * arms
    kept = scored * image + min(scored, config.judge.at_once) * recomputed
    decoder = memory.tree_bytes(arguments.base["vae"])
  else:
    kept = latents * model.kept(config.model.remat)
  if samples:
    of = config.pathwise
    judged = images * (of.repeats if of.method == "renoised" else 1)
    judged = min(judged, of.at_once) * model.kept_by_judge
    # The backward pass recomputes a step, or decodes images, at a time; only a prediction
    # inside of the trajectory is not recomputed.
    kept = kept + judged if of.method == "predicted" else max(kept, judged)
    batch = batch["rows"]  # it holds the judge too
  whole, split = model.judge
  wide = on(state.params)
  sums = wide if config.train.accumulate > 1 else 0
  rows = (batch, arguments.rollout)
  parts = {
    "parameters, moments, average": wide + on(state.ema) + on(state.opt_state),
    "gradients": wide + sums,
    "weights as computed with": _working_weights(checked, arguments, model),
    # The base weights stay on the devices until the end, for the evaluation.
    "frozen copies": on(state.policy_copy) + on(model.base) + on(arguments.start),
    "text encoders, VAE": on(model.encoders) + decoder,
    "judge of samples": memory.tree_bytes(whole) + on(split),
    "kept for the backward pass": kept,
    "attention's logits": 0 if model.fused else latents * _logits_bytes(checked),
    "batch": memory.tree_bytes(rows) / mesh.size + on(state.replay),
  }
  parts = {name: value / GIB for name, value in parts.items()}
  return {**parts, "total": sum(parts.values())}


def _working_weights(checked: Any, arguments: Any, model: _Model) -> float:
  """Returns the bytes of weights that an update gathers or casts for the denoiser."""
  import jax  # noqa: PLC0415

  from jaxpref.models import denoiser  # noqa: PLC0415

  config, fixed = checked.config, checked.pipeline.family.fixed
  networks = [model.base if config.lora.rank else arguments.state.params]
  if checked.pipeline.scorer or (not config.lora.rank and checked.reference):
    networks.append(model.base)  # what predicts for a scorer, or the reference
  # Tables that are never trained are looked up where they are.
  weights = jax.tree.leaves([denoiser.split_fixed(of, fixed)[0] for of in networks])
  width = 2 if config.model.dtype == "bfloat16" else 4
  if checked.mesh.shape["fsdp"] == 1:
    weights = [x for x in weights if x.dtype.itemsize > width]
  return sum(x.size for x in weights) * width


def _search(
  checked: Any, arguments: Any, model: _Model, chip: Chip
) -> Iterator[dict[str, Any]]:
  """Yields the largest micro-batch that fits, by `mesh.fsdp` (up to 64) and `model.remat`."""
  from jaxpref import sharding  # noqa: PLC0415

  rows, count = checked.config.train.batch_size, checked.mesh.size
  # Without a backward pass of the denoiser, nothing of it is kept.
  remats = [checked.config.model.remat] if checked.pipeline.scorer else REMAT
  accumulations = [n for n in range(1, rows + 1) if rows % (n * count) == 0]
  for fsdp in (n for n in (1, 2, 4, 8, 16, 32, 64) if count % n == 0):
    config = checked.config.copy_and_resolve_references().unlock()
    config.mesh.data, config.mesh.fsdp = -1, fsdp
    mesh = sharding.abstract_mesh(config.mesh, count)
    trial = dataclasses.replace(checked, config=config, mesh=mesh)
    for config.model.remat in remats:
      for config.train.accumulate in accumulations:
        needed = _memory(trial, arguments, model)["total"]
        if needed <= _USABLE * chip.memory:
          yield {
            "mesh.fsdp": fsdp,
            "model.remat": config.model.remat,
            "train.accumulate": config.train.accumulate,
            "rows of a device at once": rows / config.train.accumulate / count,
            "memory": needed,
          }
          break


def describe(numbers: dict[str, Any]) -> str:
  """Formats the plan as a text with tables."""
  device, memory = numbers["device"], numbers["memory"]
  total = sum(numbers["flops"].values())
  lines = [
    f"{numbers['config']} with {numbers['model']} on {numbers['topology']}: "
    f"{numbers['devices']} x {device['kind']}, mesh {numbers['mesh']}",
    f"parameters of the denoiser: {numbers['parameters']:,}; trained: {numbers['trained']:,}",
    "",
    f"per update: {_flops(total)} in total, {numbers['seconds']:.3g} s at "
    f"{100 * numbers['mfu']:.0f} % of peak; all of training: {numbers['hours']:.2g} hours",
  ]
  for phase, cost in numbers["flops"].items():
    lines.append(f"  {phase:<10} {_flops(cost):>15}  {100 * cost / total:3.0f} %")
  lines += [
    "",
    "memory per device as configured, GiB (an estimate without scratch space, which grows with",
    "rows: for 16 rows of SD 1.5 per device the TPU compiler counted a third more):",
  ]
  lines += [f"  {name:<30} {value:8.2f}" for name, value in memory.items()]
  verdict = "fits" if numbers["fits"] else "does NOT fit"
  lines.append(f"  it {verdict} into 90 % of {device['memory']:.0f} GiB")
  if device["kind"].startswith("NVIDIA"):
    lines.append("  (JAX allocates only 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 is set)")
  lines += ["", "settings that fit, each with its largest micro-batch (10 % left free):"]
  columns = (
    "mesh.fsdp",
    "model.remat",
    "train.accumulate",
    "rows of a device at once",
    "memory",
  )
  rows = [
    [f"{s[c]:.2f}" if isinstance(s[c], float) else str(s[c]) for c in columns]
    for s in numbers["settings"]
  ]
  lines += _table(columns, rows) if rows else ["  nothing"]
  return "\n".join(lines)


def _flops(value: float) -> str:
  return f"{value / 1e12:,.1f} TFLOP" if value >= 1e11 else f"{value / 1e9:,.3g} GFLOP"


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
  pad = lambda row: "  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True))  # noqa: E731
  return [pad(columns), *map(pad, rows)]


if __name__ == "__main__":
  cli.run(main)
