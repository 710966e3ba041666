"""How is time measured on a machine that others use too? In turns."""

from collections.abc import Callable, Mapping, Sequence
import importlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import statistics
import time
from typing import Any

# A turn: one step that does not count, then steps for so long, but so many.
TURN_SECONDS = 0.5
TURN_STEPS = 3
# A round counts as quiet while other processes use less than this of a core.
QUIET = 0.1

Step = Callable[[], None]
# Takes a turn: median seconds of a step, and the cores that others used.
Turn = Callable[[], tuple[float, float]]


def threads() -> int:
  """The cores that this process may use; either framework has as many threads.
  """
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def version(package: str) -> str | None:
  """The version of an installed package, without importing it."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def product_rate(side: int = 2048, times: int = 10) -> float:
  """FLOP/s of the fastest of some products of square float32 matrices."""
  import jax
  import jax.numpy as jnp

  x = jnp.ones((side, side))
  multiply = jax.jit(jnp.matmul)
  seconds = []
  for _ in range(1 + times):
    start = time.perf_counter()
    jax.block_until_ready(multiply(x, x))
    seconds.append(time.perf_counter() - start)
  return 2 * side**3 / min(seconds[1:])


def interleave(
    contestants: Mapping[str, Turn], rounds: int, patience: float
) -> tuple[dict[str, list[float]], float]:
  """Lets the contestants take turns.

  Args:
    contestants: name -> a function that takes a turn.
    rounds: how many rounds to keep, the quietest ones.
    patience: seconds after which the rounds so far must do, if enough.

  Returns:
    name -> median seconds per step of each kept round; and the cores that
    other processes used in the least quiet round of them.
  """
  found: list[tuple[float, dict[str, float]]] = []
  end = time.perf_counter() + patience
  while len(found) < rounds or (
      sum(others <= QUIET for others, _ in found) < rounds
      and time.perf_counter() < end
  ):
    turns = {name: take() for name, take in contestants.items()}
    found.append((
        max(others for _, others in turns.values()),
        {name: seconds for name, (seconds, _) in turns.items()},
    ))
  kept = sorted(found, key=lambda item: item[0])[:rounds]
  seconds = {name: [turns[name] for _, turns in kept] for name in contestants}
  return seconds, kept[-1][0]


def turn(
    step: Step, least: float | None = None, steps: int | None = None
) -> tuple[float, float]:
  """Takes a turn.

  Args:
    step: takes one step and waits for it.
    least: seconds of all steps together; by default `TURN_SECONDS`.
    steps: at least so many; by default `TURN_STEPS`.

  Returns:
    Median seconds of a step, and the cores that others used meanwhile.
  """
  least = TURN_SECONDS if least is None else least
  steps = TURN_STEPS if steps is None else steps
  step()  # Threads wake up, and the cache fills.
  start, used = time.perf_counter(), cpu_seconds()
  seconds = []
  while sum(seconds) < least or len(seconds) < steps:
    begin = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - begin)
  machine, mine = (b - a for a, b in zip(used, cpu_seconds()))
  others = max(machine - mine, 0.0) / (time.perf_counter() - start)
  return statistics.median(seconds), others


def cpu_seconds(path: str = "/proc/stat") -> tuple[float, float]:
  """CPU seconds of the machine and of this process since they started.

  Where there is no such file, only this process is known.
  """
  mine = time.process_time()
  try:
    words = pathlib.Path(path).read_text().split("\n", 1)[0].split()
  except OSError:
    return mine, mine
  user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return ticks / os.sysconf("SC_CLK_TCK"), mine


def spread(seconds: Sequence[float]) -> float:
  """The interquartile range, relative to the median."""
  low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
  return (high - low) / statistics.median(seconds)


class Worker:
  """Contestants in a process of their own.

  Another framework brings its own threads and its own habits of allocation,
  and should neither suffer nor profit from ours.
  """

  def __init__(self, target: str, *args: Any, daemon: bool = True) -> None:
    """Starts the process and waits until its contestants are ready.

    Args:
      target: "module:function"; the function makes `(contestants, facts)`, a
        mapping of name to step, and anything that can be pickled.
      *args: of the function.
      daemon: whether it ends with this process even where nobody closes it;
        a daemon cannot have processes of its own.

    Raises:
      ValueError: with what the function raised, if it did.
    """
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
        target=_serve, args=(theirs, target, args), daemon=daemon
    )
    self._process.start()
    theirs.close()
    self.pid = self._process.pid
    names, self.facts = self._receive()
    self.turns: dict[str, Turn] = {
        name: self._turn_of(name) for name in names
    }

  def _turn_of(self, name: str) -> Turn:
    def ask() -> tuple[float, float]:
      self._pipe.send((name, TURN_SECONDS, TURN_STEPS))
      return self._receive()

    return ask

  def _receive(self) -> Any:
    try:
      fault, found = self._pipe.recv()
    except EOFError:
      self._process.join()
      code = self._process.exitcode
      raise ValueError(f"a process to compare with died: {code}") from None
    if fault:
      self.close()
      raise ValueError(fault)
    return found

  def close(self) -> None:
    """Ends the process."""
    try:
      self._pipe.send(None)
    except OSError:  # It has ended.
      pass
    self._process.join()


def _serve(pipe: Any, target: str, args: Sequence[Any]) -> None:
  """The life of a `Worker`: makes contestants, then takes turns for ever."""
  module, name = target.split(":")
  try:
    contestants, facts = getattr(importlib.import_module(module), name)(*args)
    pipe.send((None, (list(contestants), facts)))
    while (asked := pipe.recv()) is not None:
      name, seconds, steps = asked
      pipe.send((None, turn(contestants[name], seconds, steps)))
  except EOFError:  # The other end is gone.
    return
  except Exception as error:
    pipe.send((f"{type(error).__name__}: {error}", None))
