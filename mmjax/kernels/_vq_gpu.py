"""Vector-quantizer lookup for Hopper GPUs, in Pallas for Mosaic GPU.

A block of threads owns a tile of rows and streams the codebook past it: one
warpgroup copies tiles of codes to shared memory, ahead of the workers, each of
which multiplies 64 rows with them and keeps the best so far. The tensor cores
multiply bfloat16; float32 is cut into three of them, whose six larger products
are all that float32 resolves.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from mmjax.kernels import _vq_jnp

# Rows of a worker: what one warpgroup multiplies at a time.
_ROWS = 64

# The swizzle of shared memory spans 64 numbers of two bytes.
_DIM = 64

# Workers, and codes in a tile: what fits first in the bytes of shared memory
# that a kernel may fill, of the 227 KiB of a block.
_PLANS = ((2, 128), (2, 64), (1, 64), (1, 32))
_SHARED_BYTES = 210 * 1024
_SLOTS = 2

# Registers of a thread that copies; the workers share what it leaves of 512.
_COPY_REGISTERS = 40

# Pairs of parts whose products count, the smallest first.
_PRODUCTS = {
    1: ((0, 0),),
    3: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
}


class _Plan(NamedTuple):
  """How the lookup is cut up.

  Attributes:
    parts: bfloat16 numbers that make one.
    workers: of a block, each with `_ROWS` rows.
    width: codes in a tile.
  """

  parts: int
  workers: int
  width: int


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _plan(dim: int, dtype: Any) -> _Plan | None:
  parts = 1 if dtype == jnp.bfloat16 else 3
  row = parts * _up(dim, _DIM) * 2
  for workers, width in _PLANS:
    if row * (workers * _ROWS + _SLOTS * width) <= _SHARED_BYTES:
      return _Plan(parts, workers, width)
  return None


def refusal(shape: tuple[int, ...], dtype: Any) -> str:
  """Why the kernel cannot serve a lookup; empty if it can.

  Args:
    shape: [K, D] of the codebook.
    dtype: of the products.
  """
  if _plan(shape[1], dtype) is None:
    return (
        f"{shape[1]} dimensions of {jnp.dtype(dtype)} do not fit in shared "
        "memory"
    )
  return ""


def _cut(x: jax.Array, parts: int, rows: int) -> jax.Array:
  """[n, D] to bfloat16[parts, rows, D'] that add up to it, zeros behind."""
  x = jnp.pad(x, ((0, rows - x.shape[0]), (0, -x.shape[1] % _DIM)))
  if parts == 1:
    return x[None]
  cut = []
  for _ in range(parts):
    # Not a cast and back, which XLA is free to drop: the rest would vanish.
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    cut.append(part.astype(jnp.bfloat16))
    x = x - part
  return jnp.stack(cut)


def _wgmma(a: Any, b: Any, parts: int) -> jax.Array:
  """f32[m, n], the product of a [parts, m, D] and b [parts, n, D]."""

  def product(acc: Any) -> jax.Array:
    for i, j in _PRODUCTS[parts]:
      plgpu.wgmma(acc, a.at[i], b.at[j].transpose((1, 0)))
    return acc[...]

  shape = a.shape[1], b.shape[1]
  return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def _emulated(a: Any, b: Any, parts: int) -> jax.Array:
  """`_wgmma` for the interpreter, which has no tensor cores."""
  return sum(
      jnp.dot(a.at[i][...], b.at[j][...].T, preferred_element_type=jnp.float32)
      for i, j in _PRODUCTS[parts]
  )


def _interpret_params() -> Any:
  # Public from jax 0.12 on.
  if hasattr(plgpu, "InterpretGPUParams"):
    return plgpu.InterpretGPUParams()
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams()


class _Scratch(NamedTuple):
  """Memory and barriers of a block of threads.

  Attributes:
    x: bf16[workers, parts, _ROWS, D].
    ready: barrier of a worker that says that its rows are there.
    codes: bf16[_SLOTS, parts, width, D].
    half: f32[_SLOTS, width]; see `_vq_jnp.half_norms`.
    full: barrier of a slot that says that its codes are there.
    free: barrier of a slot that says that no worker needs it any more.
    index: i32[workers, _ROWS], the result.
  """

  x: Any
  ready: Any
  codes: Any
  half: Any
  full: Any
  free: Any
  index: Any


def _scratch(plan: _Plan, dim: int) -> _Scratch:
  parts, workers, width = plan
  barrier = lambda arrivals, count: plgpu.Barrier(
      num_arrivals=arrivals, num_barriers=count
  )
  return _Scratch(
      x=plgpu.SMEM((workers, parts, _ROWS, dim), jnp.bfloat16),
      ready=barrier(parts, workers),
      codes=plgpu.SMEM((_SLOTS, parts, width, dim), jnp.bfloat16),
      half=plgpu.SMEM((_SLOTS, width), jnp.float32),
      full=barrier(parts + 1, _SLOTS),
      free=barrier(workers, _SLOTS),
      index=plgpu.SMEM((workers, _ROWS), jnp.int32),
  )


def _copy_in(
    plan: _Plan, refs: Any, scratch: _Scratch, tile: jax.Array, steps: int
) -> None:
  """What the copying warpgroup does: the rows, then all codes in order."""
  x, codes, half = refs
  for worker in range(plan.workers):
    rows = pl.ds((tile * plan.workers + worker) * _ROWS, _ROWS)
    for part in range(plan.parts):
      plgpu.copy_gmem_to_smem(
          x.at[part, rows],
          scratch.x.at[worker, part],
          scratch.ready.at[worker],
      )

  @pl.loop(0, steps)
  def _(step: jax.Array) -> None:
    slot = lax.rem(step, jnp.int32(_SLOTS))
    pl.when(step >= _SLOTS)(
        functools.partial(plgpu.barrier_wait, scratch.free.at[slot])
    )
    columns = pl.ds(step * plan.width, plan.width)
    full = scratch.full.at[slot]
    for part in range(plan.parts):
      plgpu.copy_gmem_to_smem(
          codes.at[part, columns], scratch.codes.at[slot, part], full
      )
    plgpu.copy_gmem_to_smem(half.at[columns], scratch.half.at[slot], full)

  # The last tiles are waited for too: a barrier is left as it was found.
  @pl.loop(max(0, steps - _SLOTS), steps)
  def _(step: jax.Array) -> None:
    plgpu.barrier_wait(scratch.free.at[lax.rem(step, jnp.int32(_SLOTS))])


def _work(
    plan: _Plan,
    index_ref: Any,
    scratch: _Scratch,
    tile: jax.Array,
    worker: jax.Array,
    steps: int,
    multiply: Callable[..., jax.Array],
) -> None:
  """What a worker does: the nearest codes of its rows."""
  shape = _ROWS, plan.width
  along = lambda x, axis: lax.broadcast_in_dim(x, shape, [axis])
  never = jnp.iinfo(jnp.int32).max

  def visit(step: jax.Array, carry: Any) -> Any:
    best, index = carry
    slot = lax.rem(step, jnp.int32(_SLOTS))
    plgpu.barrier_wait(scratch.full.at[slot])
    products = multiply(
        scratch.x.at[worker], scratch.codes.at[slot], plan.parts
    )
    score = along(scratch.half.at[slot][...], 1) - products
    plgpu.barrier_arrive(scratch.free.at[slot])
    top = score.min(axis=1)
    code = lax.broadcasted_iota(jnp.int32, shape, 1)
    first = jnp.where(score == along(top, 0), code, never).min(axis=1)
    # Never true of a NaN: such rows keep code 0.
    better = top < best
    index = jnp.where(better, first + step * plan.width, index)
    return jnp.where(better, top, best), index

  plgpu.barrier_wait(scratch.ready.at[worker])
  start = (
      jnp.full((_ROWS,), jnp.inf, jnp.float32),
      jnp.zeros((_ROWS,), jnp.int32),
  )
  _, index = lax.fori_loop(0, steps, visit, start)
  scratch.index[worker] = index
  plgpu.commit_smem()
  rows = pl.ds((tile * plan.workers + worker) * _ROWS, _ROWS)
  plgpu.copy_smem_to_gmem(scratch.index.at[worker], index_ref.at[rows])
  plgpu.wait_smem_to_gmem(0)


def lookup(
    x: jax.Array, codebook: jax.Array, metric: str, interpret: bool
) -> jax.Array:
  """The indices i32[N] of `vq_lookup.vq_lookup`."""
  rows, count = x.shape[0], codebook.shape[0]
  codes = _vq_jnp.comparable(codebook, metric)
  dtype = jnp.promote_types(x.dtype, codes.dtype)
  plan = _plan(x.shape[1], dtype)
  parts, workers, width = plan
  height = _up(rows, workers * _ROWS)
  padded = _up(count, width)
  half = jnp.pad(
      _vq_jnp.half_norms(codes, metric),
      (0, padded - count),
      constant_values=jnp.inf,
  )
  x = _cut(x.astype(dtype), parts, height)
  codes = _cut(codes.astype(dtype), parts, padded)
  steps = padded // width
  multiply = _emulated if interpret else _wgmma
  registers = min(256, (512 - _COPY_REGISTERS) // workers // 8 * 8)

  def kernel(*refs: Any) -> None:
    *sources, index = refs[:4]
    scratch = _Scratch(*refs[4:])
    tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")

    @pl.when(warpgroup == workers)
    def _() -> None:
      plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
      _copy_in(plan, sources, scratch, tile, steps)

    @pl.when(warpgroup < workers)
    def _() -> None:
      plgpu.set_max_registers(registers, action="increase")
      _work(plan, index, scratch, tile, warpgroup, steps, multiply)

  kernel.__name__ = "vq_lookup"
  index = plgpu.kernel(
      kernel,
      out_type=jax.ShapeDtypeStruct((height,), jnp.int32),
      scratch_types=list(_scratch(plan, x.shape[2])),
      compiler_params=plgpu.CompilerParams(
          lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      ),
      grid=(height // (workers * _ROWS),),
      grid_names=("tile",),
      num_threads=workers + 1,
      thread_name="warpgroup",
      interpret=_interpret_params() if interpret else None,
  )(x, codes, half)
  return index[:rows]
