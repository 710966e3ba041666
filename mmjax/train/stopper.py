"""How does a run end early, on one process and on many at once?"""

import collections
from collections.abc import Callable
import functools
import signal
import threading
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mmjax import sharding


class InterruptedRun(RuntimeError):
  """A signal stopped the run, and its state is saved.

  Attributes:
    signal: its number.
  """

  def __init__(self, signum: int, step: int) -> None:
    super().__init__(
        f"{signal.Signals(signum).name}: saved step {step:,}; the same command "
        "continues from there"
    )
    self.signal = signum


class Stopper:
  """Tells the loop that SIGTERM or SIGINT asked for an end.

  Several processes vote at every step, and learn of a vote some steps later,
  when it is there anyway: so all of them stop after the same step. (With the
  preemption service of JAX a process may pass the step that the others stop
  at, if steps are fast.) The second SIGINT ends the process at once.

  Attributes:
    signal: what stops the run, once all processes know of it.
  """

  def __init__(self, mesh: Mesh, delay: int) -> None:
    """`delay`: how many steps later the votes of a step are counted."""
    self.signal: int | None = None
    self._mine = 0
    self._mesh, self._delay = mesh, delay
    self._votes: collections.deque[jax.Array] = collections.deque()
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "Stopper":
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        self._old[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *unused: Any) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)

  def _note(self, signum: int, frame: types.FrameType | None) -> None:
    self._mine = signum
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def asked(self) -> bool:
    """Whether to stop after this step; call it at every step."""
    found = self._mine
    if jax.process_count() > 1:
      self._votes.append(_highest(self._mesh, found))
      done = len(self._votes) > self._delay
      found = int(self._votes.popleft()) if done else 0
    self.signal = found or None
    return self.signal is not None


def _highest(mesh: Mesh, number: int) -> jax.Array:
  """The highest `number` of all processes, i32[], on its way."""
  everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  local = np.full(len(mesh.local_devices), number, np.int32)
  return _maximum(mesh)(
      jax.make_array_from_process_local_data(everywhere, local)
  )


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
