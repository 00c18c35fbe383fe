"""How JAX is set up: its devices on a machine without an accelerator, its cache."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from jaxpref import __version__

# Of the control group: microseconds of CPU time, or "max", in each period of so many.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_all_cores() -> None:
  """Makes each CPU core a device of its own, unless XLA_FLAGS already decides.

  XLA cuts the operations of a network as small as the bundled one into pieces too short to
  be worth a thread. Whole rows of the batch are a better piece of work: with one device a
  core, an update of the bundled UNet takes about half the time. Accelerators are not
  touched. To be called before JAX starts.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if "host_platform_device_count" in flags or "multi_thread_eigen" in flags:
    return
  # A power of two, for batches to divide; beyond 8 they would be too thin.
  cores = _cores()
  count = min(8, 1 << (cores.bit_length() - 1))
  flags += f" --xla_force_host_platform_device_count={count}"
  if count == cores:  # else the operations' own threads use the cores that are left
    flags += " --xla_cpu_multi_thread_eigen=false"
  os.environ["XLA_FLAGS"] = flags.strip()


def cache_programs() -> None:
  """Keeps compiled programs for the next run: a resumed one starts at once.

  In `~/.cache/jaxpref/jax` (or XDG_CACHE_HOME), unless JAX_COMPILATION_CACHE_DIR says
  where; nowhere if that place cannot be written, as for a container's user without a home.
  """
  import jax  # noqa: PLC0415  # `use_all_cores` comes before it

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    if (cache := _own_cache()) is None:
      return
    jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # A run has dozens of small programs, which JAX would leave out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _own_cache() -> Path | None:
  """This package's cache directory; None where there is no place for one."""
  home = os.environ.get("XDG_CACHE_HOME")
  try:
    cache = (Path(home) if home else Path.home() / ".cache") / "jaxpref"
    cache.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # RuntimeError: neither HOME nor a user with a home
    return None
  return cache if os.access(cache, os.W_OK) else None


def facts() -> dict[str, str]:
  """Devices, machine and versions, for a report."""
  import jax  # noqa: PLC0415

  several = jax.process_count()
  processes = f", {several} processes" if several > 1 else ""
  packages = ("jax", "flax", "diffusers", "numpy")
  versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
  code = _git_state()
  return {
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}",
    "versions": f"jaxpref {__version__}{code and f' ({code})'}, {versions}",
  }


def _git_state() -> str:
  """The commit of a checkout whose code this is, and whether it was changed; else ''."""
  here = Path(__file__).parents[1]
  if not (here.parent / ".git").exists():
    return ""
  said = []
  for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "."]):
    try:
      done = subprocess.run(
        ["git", "-C", str(here), *command],
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=10,
      )
    except (OSError, subprocess.TimeoutExpired):
      return ""
    if done.returncode:
      return ""
    said.append(done.stdout.strip())
  return said[0] + (", changed" if said[1] else "")


def _cores() -> int:
  """Cores that this process may keep busy: those it may run on, or its container's share."""
  if sys.platform != "linux":
    return os.cpu_count() or 1
  cores = len(os.sched_getaffinity(0))
  try:
    quota, period = _QUOTA.read_text(encoding="utf-8").split()
  except (OSError, ValueError):
    return cores
  return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
