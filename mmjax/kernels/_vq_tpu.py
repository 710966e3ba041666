"""Vector-quantizer lookup on a TPU: Pallas kernels for Mosaic.

Scores are laid out [codes, rows]: the minimum runs over sublanes, which is
elementwise work, and the indices of a tile of rows come out dense in lanes.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mmjax.kernels import _vq_jnp

# Codes whose scores exist at a time; a multiple of every dtype's sublanes.
_CODES = 512

# Bytes of on-chip memory for codebooks and for all else: of the 64 MiB or more
# that a core has since v5, and of its 16 MiB until then.
_CODEBOOK_BYTES, _OTHER_BYTES = 24 * 2**20, 24 * 2**20
_SMALL_MEMORY = ("tpu v2", "tpu v3", "tpu v4")
_SMALL_CODEBOOK_BYTES, _SMALL_OTHER_BYTES = 4 * 2**20, 11 * 2**20

# Bytes of a codebook that one step of the lookup's grid holds, where there is
# room for two of them.
_BLOCK_BYTES = 2**22

_LANES, _SUBLANES = 128, 16


def refusal(device_kind: str, shape: tuple[int, ...], dtype: Any) -> str:
  """Why no kernel serves codebooks of a shape; empty if one does.

  Args:
    device_kind: see `device.kind`.
    shape: [K, D] for a lookup, [Q, K, D] for a residual quantizer.
    dtype: of the codebooks.
  """
  if shape[-1] > 1024:
    return f"the kernels take at most 1024 dimensions, not {shape[-1]}"
  if len(shape) == 3:
    held, room = _codebook_bytes(shape, dtype), _memory(device_kind)[0]
    if held > room:
      return (
          f"the codebooks take {held / 2**20:.1f} MiB on chip, where "
          f"{room / 2**20:.0f} MiB are for them"
      )
  return ""


def _memory(device_kind: str) -> tuple[int, int]:
  """Bytes of on-chip memory for codebooks, and for everything else."""
  if device_kind.lower().startswith(_SMALL_MEMORY):
    return _SMALL_CODEBOOK_BYTES, _SMALL_OTHER_BYTES
  return _CODEBOOK_BYTES, _OTHER_BYTES


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _codebook_bytes(shape: tuple[int, ...], dtype: Any) -> int:
  """Of codebooks [..., K, D] on chip, padded to whole tiles."""
  *levels, count, dim = shape
  count = _up(count, _tile(count))
  itemsize = jnp.dtype(dtype).itemsize
  return math.prod(levels) * count * _up(dim, _LANES) * itemsize


def _tile(count: int) -> int:
  """Codes in a tile of a codebook of `count`."""
  return min(_CODES, _up(count, _SUBLANES))


def _rows(count: int, dim: int) -> int:
  """Rows in a tile: all if they are few, fewer if they are wide."""
  return min(count, 512 if dim <= 512 else 256)


def _search(
    x: jax.Array,
    codes_ref: Any,
    best: jax.Array,
    index: jax.Array,
    *,
    base: jax.Array | int,
    count: int,
    euclidean: bool,
) -> tuple[jax.Array, jax.Array]:
  """Continues a search for the nearest codes among those of a block.

  Args:
    x: [rows, D].
    codes_ref: [C, D], whole tiles.
    best: f32[1, rows], the lowest scores so far.
    index: i32[1, rows], where they were found.
    base: number of the first code of the block.
    count: codes of the codebook; those that follow are padding.
    euclidean: whether the norms of the codes count.

  Returns:
    The new `best` and `index`.
  """
  tile = _tile(count)

  def step(j: jax.Array, carry: Any) -> Any:
    best, index = carry
    codes = codes_ref[pl.ds(pl.multiple_of(j * tile, tile), tile), :]
    code = base + j * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    half = jnp.zeros((tile, 1), jnp.float32)
    if euclidean:
      half = jnp.square(codes.astype(jnp.float32)).sum(axis=1, keepdims=True)
    half = jnp.where(code < count, half * 0.5, jnp.inf)
    score = half - _vq_jnp.product(codes, x)
    top = score.min(axis=0, keepdims=True)
    first = jnp.where(score == top, code, count).min(axis=0, keepdims=True)
    # Never true of a NaN: such rows keep code 0.
    better = top < best
    return jnp.where(better, top, best), jnp.where(better, first, index)

  return lax.fori_loop(0, codes_ref.shape[0] // tile, step, (best, index))


def lookup(
    x: jax.Array, codebook: jax.Array, metric: str, device_kind: str,
    interpret: bool,
) -> jax.Array:
  """The indices i32[N] of `vq_lookup.vq_lookup`."""
  (rows, dim), count = x.shape, codebook.shape[0]
  codes = _vq_jnp.comparable(codebook, metric)
  tile, step = _tile(count), _rows(rows, dim)
  room, other = _memory(device_kind)
  # As many tiles as have room, spread evenly over the blocks.
  held = _codebook_bytes((count, dim), codes.dtype)
  blocks = -(-held // min(_BLOCK_BYTES, room // 2))
  block = _up(-(-count // blocks), tile)
  blocks = -(-count // block)
  codes = jnp.pad(codes, ((0, blocks * block - count), (0, 0)))
  # A codebook of one block stays on chip for all rows.
  loads = 1 if blocks == 1 else -(-rows // step)

  def kernel(x_ref: Any, codes_ref: Any, index_ref: Any, best_ref: Any) -> None:
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _() -> None:
      best_ref[...] = jnp.full_like(best_ref, jnp.inf)
      index_ref[...] = jnp.zeros_like(index_ref)

    best_ref[...], index_ref[...] = _search(
        x_ref[...], codes_ref, best_ref[...], index_ref[...],
        base=j * block, count=count, euclidean=metric == "euclidean",
    )

  index = pl.pallas_call(
      kernel,
      grid=(-(-rows // step), blocks),
      in_specs=[
          pl.BlockSpec((step, dim), lambda i, j: (i, 0)),
          pl.BlockSpec((block, dim), lambda i, j: (j, 0)),
      ],
      out_specs=pl.BlockSpec((1, step), lambda i, j: (0, i)),
      out_shape=jax.ShapeDtypeStruct((1, rows), jnp.int32),
      scratch_shapes=[pltpu.VMEM((1, step), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=room + other,
      ),
      cost_estimate=pl.CostEstimate(
          flops=2 * rows * count * dim,
          transcendentals=0,
          bytes_accessed=_nbytes(x) + loads * _nbytes(codes) + 4 * rows,
      ),
      interpret=interpret,
      name="vq_lookup",
  )(x, codes)
  return index[0]


def _nbytes(x: Any) -> int:
  """Of an array in a TPU's memory, where the last dimension fills lanes."""
  *rows, dim = x.shape
  return math.prod(rows) * _up(dim, _LANES) * x.dtype.itemsize


def residual(
    x: jax.Array, codebooks: jax.Array, active: jax.Array, device_kind: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """See `vq_lookup.residual_vq`: all codebooks stay on chip for all rows."""
  rows, dim = x.shape
  levels, count, _ = codebooks.shape
  tile, step = _tile(count), _rows(rows, dim)
  padding = (0, 0), (0, _up(count, tile) - count), (0, 0)
  codebooks = jnp.pad(codebooks, padding)
  out_shape = (
      jax.ShapeDtypeStruct((levels, rows), jnp.int32),
      jax.ShapeDtypeStruct(x.shape, x.dtype),
  )
  moved = (x, codebooks, active, *out_shape)
  codes, quantized = pl.pallas_call(
      functools.partial(_residual_kernel, count=count),
      grid=(-(-rows // step),),
      in_specs=[
          pl.BlockSpec((step, dim), lambda i: (i, 0)),
          pl.BlockSpec(
              codebooks.shape, lambda i: (0, 0, 0),
              pipeline_mode=pl.Buffered(1),
          ),
          pl.BlockSpec((1, step), lambda i: (0, i)),
      ],
      out_specs=(
          pl.BlockSpec((levels, step), lambda i: (0, i)),
          pl.BlockSpec((step, dim), lambda i: (i, 0)),
      ),
      out_shape=out_shape,
      scratch_shapes=[pltpu.VMEM((step, dim), jnp.float32)] * 2,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",),
          vmem_limit_bytes=sum(_memory(device_kind)),
      ),
      cost_estimate=pl.CostEstimate(
          # A search, and the product that gathers the chosen rows.
          flops=2 * 2 * levels * rows * count * dim,
          transcendentals=0,
          bytes_accessed=sum(_nbytes(array) for array in moved),
      ),
      interpret=interpret,
      name="residual_vq",
  )(x, codebooks, active[None])
  return codes.T, quantized


def _residual_kernel(
    x_ref: Any,
    codebooks_ref: Any,
    active_ref: Any,
    codes_ref: Any,
    quantized_ref: Any,
    rest_ref: Any,
    total_ref: Any,
    *,
    count: int,
) -> None:
  levels, padded, _ = codebooks_ref.shape
  tile = _tile(count)
  rest_ref[...] = x_ref[...].astype(jnp.float32)
  total_ref[...] = jnp.zeros_like(total_ref)

  def one_level(level: jax.Array, _: None) -> None:
    book_ref = codebooks_ref.at[level]
    shape = 1, x_ref.shape[0]
    _, index = _search(
        rest_ref[...], book_ref,
        jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32),
        base=0, count=count, euclidean=True,
    )
    index = jnp.where(level < active_ref[...], index, -1)
    codes_ref[pl.ds(level, 1), :] = index

    def gather(j: jax.Array, _: None) -> None:
      book = book_ref[pl.ds(pl.multiple_of(j * tile, tile), tile), :]
      code = j * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
      # Exact: one product by 1 per row, all others by 0. None for code -1.
      chosen = _vq_jnp.product((code == index).astype(book.dtype), book, axis=0)
      rest_ref[...] -= chosen
      total_ref[...] += chosen

    lax.fori_loop(0, padded // tile, gather, None)

  lax.fori_loop(0, levels, one_level, None)
  quantized_ref[...] = total_ref[...].astype(quantized_ref.dtype)
