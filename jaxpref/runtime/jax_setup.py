"""Setup of JAX: its CPU devices, its compilation cache, and facts about the machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from jaxpref import __version__

# The control group's CPU limit: microseconds of CPU time (or "max") per period, and the period.
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def use_all_cores() -> None:
  """Makes each CPU core a JAX device, unless XLA_FLAGS already decides.

  XLA splits the operations of a small network into pieces that are too short to be worth a
  thread. With one device per core the batch is split by rows instead, and an update of the
  bundled UNet takes about half the time. Accelerators are not affected. Must be called before
  JAX starts.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if "host_platform_device_count" in flags or "multi_thread_eigen" in flags:
    return
  # A power of two, so that batches divide; with more than 8, each device has too few rows.
  cores = _cores()
  count = min(8, 1 << (cores.bit_length() - 1))
  flags += f" --xla_force_host_platform_device_count={count}"
  if count == cores:  # else the threads of single operations use the remaining cores
    flags += " --xla_cpu_multi_thread_eigen=false"
  os.environ["XLA_FLAGS"] = flags.strip()


def cache_programs() -> None:
  """Stores compiled programs on disk, so that a resumed run starts without compiling.

  The directory is JAX_COMPILATION_CACHE_DIR or, by default, `~/.cache/jaxpref/jax` (under
  XDG_CACHE_HOME if set). Does nothing if the default is not writable, as for a container's
  user without a home directory.
  """
  import jax  # noqa: PLC0415  # `use_all_cores` must run first

  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    if (cache := _own_cache()) is None:
      return
    jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # JAX's default leaves out programs that compile quickly, and a run has dozens of those.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _own_cache() -> Path | None:
  """Returns this package's cache directory, or None if it is not writable."""
  home = os.environ.get("XDG_CACHE_HOME")
  try:
    cache = (Path(home) if home else Path.home() / ".cache") / "jaxpref"
    cache.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # RuntimeError: no HOME, and the user has no home directory
    return None
  return cache if os.access(cache, os.W_OK) else None


def facts() -> dict[str, str]:
  """Returns devices, machine and versions, for a report."""
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
  """Returns the commit of this checkout and whether it has changes, or '' if not in one."""
  here = Path(__file__).parents[1]
  if not (here.parent / ".git").exists():
    return ""
  outputs = []
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
    outputs.append(done.stdout.strip())
  commit, changes = outputs
  return commit + (", changed" if changes else "")


def _cores() -> int:
  """Returns the number of cores that the process may use, limited by its container's quota."""
  if sys.platform != "linux":
    return os.cpu_count() or 1
  cores = len(os.sched_getaffinity(0))
  try:
    quota, period = _QUOTA.read_text(encoding="utf-8").split()
  except (OSError, ValueError):
    return cores
  return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
