"""How a Hopper kernel is run: one warpgroup copies, the others compute.

A block of threads owns a tile of some operands and streams tiles of others
through shared memory, visiting those of a schedule only. One warpgroup copies,
ahead of the workers, a warpgroup for each 64 rows of the tile, which compute.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from mmjax.kernels import intervals

# Rows of a worker: what one warpgroup multiplies at a time.
ROWS = 64

# Bytes of shared memory that a kernel may fill, of the 227 KiB of a block, and
# the tiles of a stream in it: one is used while the next ones come.
_SHARED_BYTES = 210 * 1024
_MIN_SLOTS, _MAX_SLOTS = 2, 4

# Registers of a thread that copies; the workers share what it leaves of 512.
_COPY_REGISTERS = 40



# The tensor cores, and what stands for them where there are none.


def _wgmma(
    a: Any,
    b: Any,
    acc: jax.Array | None = None,
    *,
    transpose: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
  """The matrix product of a tile, by the tensor cores.

  Args:
    a: [m, k], registers or a reference to shared memory.
    b: reference to shared memory, [k, n], or [n, k] if `transpose`.
    acc: f32[m, n] to which the product is added; None for zeros.
    transpose: whether b is to be transposed.
    meanwhile: called when the product has been started, not finished.

  Returns:
    f32[m, n].
  """
  if transpose:
    b = b.transpose((1, 0))

  def product(result: Any) -> None:
    plgpu.wgmma(result, a, b)
    meanwhile()

  if acc is not None:
    return pl.run_state(product)(plgpu.ACC.init(acc))

  def fresh(result: Any) -> jax.Array:
    product(result)
    return result[...]

  return pl.run_scoped(fresh, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _emulated(
    a: Any,
    b: Any,
    acc: jax.Array | None = None,
    *,
    transpose: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
  """`_wgmma` for the interpreter, which takes no operand in registers."""
  meanwhile()
  b = b[...].T if transpose else b[...]
  product = jnp.dot(a[...], b, preferred_element_type=jnp.float32)
  return product if acc is None else acc + product


def _interpret_params() -> Any:
  # Public from jax 0.12 on.
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


# Who copies what, and when.


class Operand(NamedTuple):
  """An array of the GPU's memory, and where a tile of it lies.

  Attributes:
    array: the array, or its type for a result.
    index: (batch, head, rows) -> index of the tile.
  """

  array: Any
  index: Callable[[Any, Any, Any], tuple[Any, ...]]


def tokens(array: Any) -> Operand:
  """[B, L, H, D]."""
  return Operand(array, lambda batch, head, rows: (batch, rows, head))


def statistic(array: Any) -> Operand:
  """[B, H, L]."""
  return Operand(array, lambda batch, head, rows: (batch, head, rows))


def shared(array: Any) -> Operand:
  """[B or 1, L], the same for all heads."""
  each = array.shape[0] > 1
  return Operand(array, lambda batch, _, rows: (batch if each else 0, rows))


class Visits(NamedTuple):
  """Which tiles of its streams does each tile visit?

  Attributes:
    start: i32[B or 1, M], the order in which the tiles are begun: those with
      the most steps first, so that no long one runs at the end, alone.
    tile: i32[B or 1, M, N], twice the number of the tile that a step visits,
      plus 1 if it is whole.
    count: i32[B or 1, M], the steps.
  """

  start: jax.Array
  tile: jax.Array
  count: jax.Array


def visits(states: jax.Array) -> Visits:
  order, count = intervals.schedule(states)
  states = jnp.take_along_axis(states, order, axis=-1)
  start = jnp.argsort(-count, axis=-1, stable=True).astype(jnp.int32)
  return Visits(start, order * 2 + (states == intervals.WHOLE), count)


class Slot(NamedTuple):
  """Where one tile of a stream lies in shared memory.

  Attributes:
    refs: of its arrays.
    full: barrier that says that they are there.
    free: barrier that says that no worker needs them any more.
  """

  refs: tuple[Any, ...]
  full: Any
  free: Any

  def wait(self) -> tuple[Any, ...]:
    """Waits for the tile; its references."""
    plgpu.barrier_wait(self.full)
    return self.refs

  def release(self) -> None:
    """Says that this worker needs the tile no more."""
    plgpu.barrier_arrive(self.free)


class Work(NamedTuple):
  """What a worker is given.

  Attributes:
    worker: its number.
    own: references to its rows of the operands that it owns.
    scratch: references to what the kernel asked for besides.
    loop: (visit, carry) -> carry calls `visit(whole, slots, carry)` for every
      tile to be visited, with a slot for each stream.
    multiply: `_wgmma`, or `_emulated`.
  """

  worker: jax.Array
  own: tuple[Any, ...]
  scratch: tuple[Any, ...]
  loop: Callable[[Callable[..., Any], Any], Any]
  multiply: Callable[..., jax.Array]


class Job(NamedTuple):
  """A kernel: its operands, its results, and what a worker does.

  Attributes:
    name: of the kernel.
    body: what a worker does; it returns the rows of every result.
    grid: (batch, heads, tiles). Tiles of one head run side by side, and read
      the same streams from the cache.
    workers: of a tile, each with `ROWS` rows of it.
    own: operands of which a worker keeps its rows.
    streams: operands of which a tile comes with every step. Those of one
      stream come, and are released, together.
    width: rows of a tile of a stream.
    visits: the tiles that are visited.
    repeats: how often a tile is visited, each time for another head.
    head: (head of the grid, repeat) -> head of the streams.
    results: the results.
    stages: for each of them, which of `own` a worker may overwrite with it
      before it is copied out; None for memory of its own.
    scratch: what the workers need besides.
  """

  name: str
  body: Callable[[Work], tuple[jax.Array, ...]]
  grid: tuple[int, int, int]
  workers: int
  own: Sequence[Operand]
  streams: Sequence[Sequence[Operand]]
  width: int
  visits: Visits
  repeats: int
  head: Callable[[Any, Any], Any]
  results: Sequence[Operand]
  stages: Sequence[int | None]
  scratch: Sequence[Any] = ()


class _Scratch(NamedTuple):
  """Memory and barriers of a block of threads.

  Attributes:
    own: [workers, ROWS, ...] for every operand of `Job.own`.
    ready: barrier that says that they are there.
    streams: [slots, width, ...] for every operand of every stream.
    full: the barriers of the slots of every stream.
    free: the same.
    stages: [workers, ROWS, ...] for every result without a stage.
    extra: what the job asked for.
  """

  own: Any
  ready: Any
  streams: Any
  full: Any
  free: Any
  stages: Any
  extra: Any


def _inner(operand: Operand) -> tuple[int, ...]:
  """Shape of one row: tokens are vectors, statistics and masks numbers."""
  return operand.array.shape[3:] if len(operand.array.shape) == 4 else ()


def _fresh(job: Job) -> list[Operand]:
  """The results that have no stage among the operands."""
  return [x for x, stage in zip(job.results, job.stages) if stage is None]


def _slot_count(job: Job) -> int:
  """How many tiles of the streams fit in shared memory."""

  def size(operands: Sequence[Operand], rows: int) -> int:
    return sum(
        rows * math.prod(_inner(x)) * x.array.dtype.itemsize for x in operands
    )

  owned = size((*job.own, *_fresh(job)), job.workers * ROWS)
  streamed = sum(size(stream, job.width) for stream in job.streams)
  return max(_MIN_SLOTS, min(_MAX_SLOTS, (_SHARED_BYTES - owned) // streamed))


def scratch_of(job: Job) -> _Scratch:
  slots = _slot_count(job)

  def buffers(operands: Sequence[Operand], parts: int, rows: int) -> Any:
    return tuple(
        plgpu.SMEM((parts, rows, *_inner(x)), x.array.dtype) for x in operands
    )

  def barriers(arrivals: int) -> Any:
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)

  return _Scratch(
      own=buffers(job.own, job.workers, ROWS),
      ready=plgpu.Barrier(num_arrivals=job.workers * len(job.own)),
      streams=tuple(buffers(x, slots, job.width) for x in job.streams),
      full=tuple(barriers(len(x)) for x in job.streams),
      free=tuple(barriers(job.workers) for _ in job.streams),
      stages=buffers(_fresh(job), job.workers, ROWS),
      extra=tuple(job.scratch),
  )


def _slots(job: Job, scratch: _Scratch, step: jax.Array) -> list[Slot]:
  slot = lax.rem(step, jnp.int32(_slot_count(job)))
  return [
      Slot(tuple(ref.at[slot] for ref in refs), full.at[slot], free.at[slot])
      for refs, full, free in zip(scratch.streams, scratch.full, scratch.free)
  ]


def _rows(tile: jax.Array, size: int) -> Any:
  return pl.ds(tile * size, size)


def _copy_in(job: Job, refs: Any, scratch: _Scratch, place: Any) -> None:
  """What the copying warpgroup does: own rows, then the streams, in order."""
  own, streams, tiles, _ = refs
  batch, head, tile, steps = place
  for worker in range(job.workers):
    rows = _rows(tile * job.workers + worker, ROWS)
    for operand, source, target in zip(job.own, own, scratch.own):
      plgpu.copy_gmem_to_smem(
          source.at[operand.index(batch, head, rows)],
          target.at[worker],
          scratch.ready,
      )

  @pl.loop(0, steps)
  def _(step: jax.Array) -> None:
    visit = lax.div(step, jnp.int32(job.repeats))
    stream_head = job.head(head, lax.rem(step, jnp.int32(job.repeats)))
    rows = _rows(lax.div(tiles[visit], jnp.int32(2)), job.width)
    for operands, sources, slot in zip(
        job.streams, streams, _slots(job, scratch, step)
    ):
      pl.when(step >= _slot_count(job))(
          functools.partial(plgpu.barrier_wait, slot.free)
      )
      for operand, source, target in zip(operands, sources, slot.refs):
        plgpu.copy_gmem_to_smem(
            source.at[operand.index(batch, stream_head, rows)],
            target,
            slot.full,
        )

  # The last tiles are waited for too: a barrier is left as it was found.
  @pl.loop(0, jnp.minimum(steps, _slot_count(job)))
  def _(step: jax.Array) -> None:
    for slot in _slots(job, scratch, step):
      plgpu.barrier_wait(slot.free)


def _work(
    job: Job,
    refs: Any,
    scratch: _Scratch,
    place: Any,
    worker: jax.Array,
    multiply: Callable[..., jax.Array],
) -> None:
  """What a worker does: its rows of every result."""
  _, _, tiles, results = refs
  batch, head, tile, steps = place
  own = tuple(ref.at[worker] for ref in scratch.own)
  fresh = iter(scratch.stages)
  stages = [
      next(fresh).at[worker] if stage is None else own[stage]
      for stage in job.stages
  ]

  def loop(visit: Callable[..., Any], carry: Any) -> Any:
    def one(step: jax.Array, carry: Any) -> Any:
      whole = lax.rem(tiles[lax.div(step, jnp.int32(job.repeats))], 2) == 1
      return visit(whole, _slots(job, scratch, step), carry)

    return lax.fori_loop(0, steps, one, carry)

  plgpu.barrier_wait(scratch.ready)
  values = job.body(Work(worker, own, scratch.extra, loop, multiply))
  for stage, value in zip(stages, values):
    stage[...] = value.astype(stage.dtype)
  plgpu.commit_smem()
  rows = _rows(tile * job.workers + worker, ROWS)
  for operand, stage, target in zip(job.results, stages, results):
    plgpu.copy_smem_to_gmem(stage, target.at[operand.index(batch, head, rows)])
  plgpu.wait_smem_to_gmem(0)


def launch(job: Job, interpret: bool) -> list[jax.Array]:
  """Runs a kernel; its results."""
  multiply = _emulated if interpret else _wgmma
  registers = min(256, (512 - _COPY_REGISTERS) // job.workers // 8 * 8)
  each = job.visits.count.shape[0] > 1

  def kernel(*refs: Any) -> None:
    rest = iter(refs)
    take = lambda operands: tuple(next(rest) for _ in operands)
    own, streams = take(job.own), tuple(map(take, job.streams))
    start, tiles, count = take(job.visits)
    results = take(job.results)
    scratch = _Scratch(*rest)
    batch, head, tile = map(lax.axis_index, ("batch", "head", "tile"))
    row = batch if each else 0
    tile = start[row, tile]
    steps = count[row, tile] * job.repeats
    refs = own, streams, tiles.at[row, tile], results
    place = batch, head, tile, steps
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == job.workers)
    def _() -> None:
      plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
      _copy_in(job, refs, scratch, place)

    @pl.when(warpgroup < job.workers)
    def _() -> None:
      plgpu.set_max_registers(registers, action="increase")
      _work(job, refs, scratch, place, warpgroup, multiply)

  kernel.__name__ = job.name
  return plgpu.kernel(
      kernel,
      out_type=[x.array for x in job.results],
      scratch_types=list(scratch_of(job)),
      compiler_params=plgpu.CompilerParams(
          approx_math=True,
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      ),
      grid=job.grid,
      grid_names=("batch", "head", "tile"),
      num_threads=job.workers + 1,
      thread_name="warpgroup",
      interpret=_interpret_params() if interpret else None,
  )(
      *(x.array for x in job.own),
      *(x.array for stream in job.streams for x in stream),
      *job.visits,
  )
