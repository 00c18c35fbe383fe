"""How JAX uses a machine that has no accelerator."""

import os
import sys


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
  count = min(8, 1 << (_cores().bit_length() - 1))
  os.environ["XLA_FLAGS"] = (
    f"{flags} --xla_force_host_platform_device_count={count} --xla_cpu_multi_thread_eigen=false"
  ).strip()


def _cores() -> int:
  """Cores that this process may run on."""
  if sys.platform == "linux":
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
