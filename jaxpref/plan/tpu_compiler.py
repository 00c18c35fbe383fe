"""The TPU compiler's numbers for a run's programs, on a machine without a TPU."""

import importlib.util
import re
import time
from typing import Any

from ml_collections import ConfigDict

from jaxpref.errors import UserError

GIB = 2**30


def compile_programs(config: ConfigDict, topology: str) -> dict[str, Any]:
  """Compiles a run's programs for TPUs and reads the compiler's numbers.

  Args:
    config: the run's configuration, with kernels that TPUs have.
    topology: of TPUs, such as 'v5e:4x4'.

  Returns:
    By program: 'memory', GiB per device by kind; 'collectives', by operation how many the
    program and its loops contain, and the MiB that a device receives; 'effort', the values of
    JAX's options for the compiler's effort; 'compile seconds'. Or 'error', for example if the
    program does not fit.

  Raises:
    UserError: libtpu is not installed, or does not know the topology.
  """
  from jax.experimental import topologies  # noqa: PLC0415

  from jaxpref import sharding  # noqa: PLC0415
  from jaxpref.training import programs, setup  # noqa: PLC0415

  if not importlib.util.find_spec("libtpu"):
    raise UserError('--compile=yes needs the TPU compiler: pip install "jax[tpu]"')
  try:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
  except Exception as error:  # plugins raise all kinds of errors
    reason = str(error).partition("\n")[0]
    raise UserError(f"cannot compile for {topology}: {reason}") from error
  mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
  checked = setup.check(config, mesh=mesh)
  program, arguments = programs.abstract_programs(checked)
  found = {"train step": _compile(program.train_step, arguments)}
  if program.rollout:
    rest = (arguments.state, arguments.base, arguments.batch["cond"], arguments.uncond)
    found["rollout"] = _compile(program.rollout, programs.rollout_arguments(program, *rest))
  return found


def _compile(program: Any, arguments: Any) -> dict[str, Any]:
  import jax  # noqa: PLC0415

  began = time.perf_counter()
  lowered = program.lower(*arguments)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    return {"error": str(error)[:2000], "compile seconds": time.perf_counter() - began}
  sizes = compiled.memory_analysis()
  parts = {
    "arguments": sizes.argument_size_in_bytes,
    "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    "temporary": sizes.temp_size_in_bytes,
    "program": sizes.generated_code_size_in_bytes,
  }
  parts = {name: value / GIB for name, value in parts.items()}
  return {
    "memory": {**parts, "total": sum(parts.values())},
    "collectives": collectives(compiled.as_text()),
    "effort": {
      name: jax.config.values[f"jax_{name}_effort"]
      for name in ("exec_time_optimization", "memory_fitting")
    },
    "compile seconds": time.perf_counter() - began,
  }


_COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)")


def collectives(hlo: str) -> dict[str, dict[str, float]]:
  """Counts the communication between devices in a compiled program's text.

  Returns:
    By operation: 'count', 'in loops' (how many of them repeat), and 'MiB' of their results on
    a device, each operation counted once.
  """
  bodies: dict[str, list[str]] = {}
  name = ""
  for line in hlo.splitlines():
    if head := _HEAD.match(line):
      name = head[1]
    bodies.setdefault(name, []).append(line)
  called = {n: set(_CALLED.findall("\n".join(lines))) for n, lines in bodies.items()}
  looped = set(re.findall(r"body=%?([\w.-]+)", hlo))
  while more := {c for n in looped for c in called.get(n, ())} - looped:
    looped |= more
  found: dict[str, dict[str, float]] = {}
  for name, lines in bodies.items():
    for shapes, operation, start in _COLLECTIVE.findall("\n".join(lines)):
      entry = found.setdefault(operation, {"count": 0, "in loops": 0, "MiB": 0.0})
      entry["count"] += 1
      entry["in loops"] += name in looped
      sizes = [_bytes(*shape) for shape in _SHAPE.findall(shapes)]
      # A "-start" operation returns operand and result, but all-reduce-start only results.
      begun = start and operation != "all-reduce" and len(sizes) > 1
      entry["MiB"] += (sizes[1] if begun else sum(sizes)) / 2**20
  return found


def _bytes(kind: str, sides: str) -> float:
  bits = int((re.findall(r"\d+", kind) or ["8"])[0])  # f32, bf16, f8e4m3fn; pred is a byte
  count = 1
  for side in filter(None, sides.split(",")):
    count *= int(side)
  return count * bits / 8


def describe_compiled(compiled: dict[str, Any]) -> list[str]:
  """Formats the result of `compile_programs` as lines of text."""
  lines = []
  for name, account in compiled.items():
    lines += ["", f"{name}, compiled in {account['compile seconds']:.0f} s:"]
    if "error" in account:
      lines.append("  " + account["error"].partition("\n")[0])
      continue
    lines += [f"  {part:<30} {value:8.2f} GiB" for part, value in account["memory"].items()]
    lines += [
      f"  {operation}: {e['count']}, {e['in loops']} of them in loops, {e['MiB']:.1f} MiB"
      for operation, e in account["collectives"].items()
    ] or ["  no communication between devices"]
  return lines
