"""Graceful stop on SIGTERM, and a watchdog that ends a run that hangs.

A cluster sends SIGTERM before it takes a machine back. All processes of the run then stop at
the same `beat`; the training loop saves a checkpoint first. If no beat comes within the time
limit, the process prints the stacks of all threads to stderr and exits, so that its launcher
can start it again; the other processes lose it and end too.
"""

import contextlib
import faulthandler
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jaxpref.errors import StoppedError

_asked = threading.Event()
_beats = itertools.count()
_limit: list[float] = []  # seconds between beats, one entry per open `watching` block


@contextlib.contextmanager
def watching(*, hang_minutes: float) -> Iterator[None]:
  """Watches the run from the first `beat` to the end of the block.

  The time before the first beat, in which programs compile, has no limit.

  Args:
    hang_minutes: longest time between two beats in minutes; 0 for no limit.
  """
  _asked.clear()
  _limit.append(60 * hang_minutes)
  before = None
  # With several processes, JAX's preemption service handles the signal and informs the others.
  if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set())
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    _limit.pop()
    _asked.clear()
    if before is not None:
      signal.signal(signal.SIGTERM, before)


def beat() -> bool:
  """Restarts the time limit and returns whether the run should stop.

  Every process must call it equally often, because all of them get the same answer at each
  beat.
  """
  if _limit and _limit[-1]:
    # File 2 is stderr; `sys.stderr` may lack a file descriptor, as in a notebook.
    faulthandler.dump_traceback_later(_limit[-1], exit=True, file=2)
  # JAX reports the preemption at one beat only, so `_asked` remembers it.
  if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_beats)):
    _asked.set()
  return _asked.is_set()


def rest() -> None:
  """Pauses the watchdog until the next `beat`, for work of unknown length."""
  faulthandler.cancel_dump_traceback_later()


def beat_or_stop() -> None:
  """Calls `beat` where nothing needs to be saved before a stop.

  Raises:
    StoppedError: the run should stop.
  """
  if beat():
    raise StoppedError("asked to stop (SIGTERM); the same command resumes this run")
