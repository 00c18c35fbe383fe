"""What watches over a run: a request to stop, and a limit to how long nothing may happen.

A cluster that takes a machine back sends SIGTERM. The run then stops at the next `beat`, all
processes of it at the same one: the training loop saves first. If no beat comes for too
long, the stacks of all threads go to stderr and the process ends, so that whoever started it
can start it again; the others end with it.
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
_limit: list[float] = []  # seconds, while a run is watched


@contextlib.contextmanager
def watching(*, hang_minutes: float) -> Iterator[None]:
  """Watches from the first `beat` to the end of the block; before it programs are compiled.

  Args:
    hang_minutes: the longest that beats may be apart; 0 for no limit.
  """
  _asked.clear()
  _limit.append(60 * hang_minutes)
  before = None
  # With several processes JAX's preemption service has the signal, and tells the others.
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
  """Says that the run is alive; every process must call it as often as the others.

  Returns:
    Whether the run is to stop: the same on all processes.
  """
  if _limit and _limit[-1]:
    # Not `sys.stderr`, which may be no file of the system's, as in a notebook.
    faulthandler.dump_traceback_later(_limit[-1], exit=True, file=2)
  # JAX says it at one beat only.
  if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_beats)):
    _asked.set()
  return _asked.is_set()


def rest() -> None:
  """Lifts the limit until the next beat, for work of no known length."""
  faulthandler.cancel_dump_traceback_later()


def beat_or_stop() -> None:
  """A `beat` where nothing needs to be saved.

  Raises:
    StoppedError: the run is to stop.
  """
  if beat():
    raise StoppedError("asked to stop (SIGTERM); the same command resumes this run")
