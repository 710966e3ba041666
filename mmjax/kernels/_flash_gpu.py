"""Flash attention for Hopper GPUs, in Pallas for Mosaic GPU.

Three kernels of one shape: the forward pass and the gradient of q own a tile of
queries and stream the tiles of keys that it sees; the gradients of k and v own
a tile of keys and stream the tiles of queries that see it. Tiles that are
hidden are neither copied nor visited; `_warpgroups.py` runs them all.
(FlashAttention-3, Shah et al. 2024.)
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from mmjax.kernels import _warpgroups as wg
from mmjax.kernels import intervals
from mmjax.kernels.intervals import Mask

# Lengths are padded to multiples of this, a multiple of every tile.
_LENGTH = 128

# The swizzle of shared memory spans 64 numbers of two bytes.
_DIM, _MAX_DIM = 64, 256

# Up to this head size, a worker's registers hold two accumulators.
_SMALL_DIM = 128

_LOG2E = math.log2(math.e)


def refusal(q_shape: tuple[int, ...], dtype: Any) -> str:
  """Why these kernels cannot serve a call; empty if they can.

  Args:
    q_shape: [B, Q, H, D].
    dtype: of q, k and v.
  """
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"the Hopper kernel computes in bfloat16, not {jnp.dtype(dtype)}"
  if q_shape[3] > _MAX_DIM:
    return f"the Hopper kernel takes head sizes to {_MAX_DIM}, not {q_shape[3]}"
  return ""


# The mathematics of one tile, on registers.


def _along(x: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
  """A vector as a matrix of which it is every column (axis 0) or row (1)."""
  return lax.broadcast_in_dim(x, shape, [axis])


def _unit(scale: float, softcap: float | None) -> float:
  """The factor from what `_scores` returns to exponents of 2; positive.

  Left to the subtraction before exp2, with which it is one instruction.
  """
  if softcap is not None:
    return softcap * _LOG2E
  return scale * _LOG2E if scale > 0 else _LOG2E


def _scores(
    products: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
  """Dot products to scores in `_unit`; with a softcap, that is the tanh."""
  if softcap is not None:
    # tanh(x) = 1 - 2 / (1 + exp(2x)): the GPU's own tanh has 11 bits.
    growth = jnp.exp2(products * (2 * scale / softcap * _LOG2E))
    return 1.0 - 2.0 / (1.0 + growth)
  return products if scale > 0 else products * scale


def _slope(scores: jax.Array, softcap: float | None) -> jax.Array | float:
  """The derivative of the softcap, from what `_scores` returned."""
  return 1.0 if softcap is None else 1.0 - scores * scores


def _hide(
    scores: jax.Array,
    whole: jax.Array,
    load: Callable[[], tuple[jax.Array, jax.Array, jax.Array]],
    rows_are_queries: bool = True,
) -> jax.Array:
  """Sets the scores that the mask hides to -inf, unless the tile is whole.

  Args:
    scores: f32[queries, keys], or the transpose.
    whole: bool[], whether every query of the tile sees every key.
    load: gives block[queries], first[keys], last[keys]; called if not whole.
    rows_are_queries: which of both `scores` is.
  """

  def compare(scores: jax.Array) -> jax.Array:
    block, first, last = load()
    rows, columns = (0, 1) if rows_are_queries else (1, 0)
    block = _along(block, rows, scores.shape)
    first = _along(first, columns, scores.shape)
    last = _along(last, columns, scores.shape)
    visible = (first <= block) & (block <= last)
    return jnp.where(visible, scores, -jnp.inf)

  return lax.cond(whole, lambda scores: scores, compare, scores)


# The three kernels.


def _forward_job(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> wg.Job:
  batch, length, heads, dim = q.shape
  workers, width = 2, 128 if dim <= _SMALL_DIM else 64
  unit = _unit(scale, softcap)

  def body(work: wg.Work) -> tuple[jax.Array, jax.Array]:
    q_rows, block = work.own
    (turns,) = work.scratch

    def turn() -> None:
      # The workers take turns: one multiplies, the other one exponentiates.
      plgpu.barrier_arrive(turns)
      plgpu.barrier_wait(turns)

    def visit(whole: jax.Array, slots: list[wg.Slot], carry: Any) -> Any:
      acc, top, total = carry
      keys, values = slots
      k_tile, first, last = keys.wait()
      s = work.multiply(q_rows, k_tile, transpose=True, meanwhile=turn)
      s = _scores(s, scale, softcap)
      s = _hide(s, whole, lambda: (block[...], first[...], last[...]))
      keys.release()
      new = jnp.maximum(top, s.max(axis=1))
      p = jnp.exp2(s * unit - _along(new * unit, 0, s.shape))
      shrink = jnp.exp2((top - new) * unit)
      acc *= _along(shrink, 0, acc.shape)
      total = total * shrink + p.sum(axis=1)
      p = p.astype(q.dtype)
      turn()
      (v_tile,) = values.wait()
      acc = work.multiply(p, v_tile, acc)
      values.release()
      return acc, new, total

    pl.when(work.worker == 1)(turn)
    # Not -inf: a row that has seen nothing must not compute inf - inf.
    lowest = jnp.finfo(jnp.float32).min / max(unit, 1.0)
    start = (
        jnp.zeros((wg.ROWS, dim), jnp.float32),
        jnp.full((wg.ROWS,), lowest, jnp.float32),
        jnp.zeros((wg.ROWS,), jnp.float32),
    )
    acc, top, total = work.loop(visit, start)
    pl.when(work.worker == 0)(turn)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top * (unit / _LOG2E) + jnp.log(total))
    return acc * _along(1.0 / total, 0, acc.shape), lse

  states = intervals.tile_states(mask, workers * wg.ROWS, width)
  share = heads // k.shape[2]
  return wg.Job(
      name="flash_forward",
      body=body,
      grid=(batch, heads, length // (workers * wg.ROWS)),
      workers=workers,
      own=(wg.tokens(q), wg.shared(mask.block)),
      streams=(
          (wg.tokens(k), wg.shared(mask.first), wg.shared(mask.last)),
          (wg.tokens(v),),
      ),
      width=width,
      visits=wg.visits(states),
      repeats=1,
      head=lambda head, _: lax.div(head, jnp.int32(share)),
      results=(
          wg.tokens(jax.ShapeDtypeStruct(q.shape, q.dtype)),
          wg.statistic(
              jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
          ),
      ),
      stages=(0, None),
      scratch=(plgpu.Barrier(num_arrivals=workers),),
  )


def _queries_job(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    scale: float,
    softcap: float | None,
) -> wg.Job:
  """The gradient of q."""
  batch, length, heads, dim = q.shape
  workers = 2 if dim <= _SMALL_DIM else 1
  unit = _unit(scale, softcap)

  def body(work: wg.Work) -> tuple[jax.Array]:
    q_rows, dout_rows, block, lse_rows, delta_rows = work.own

    def visit(whole: jax.Array, slots: list[wg.Slot], dq: Any) -> jax.Array:
      keys, values = slots
      k_tile, first, last = keys.wait()
      s = work.multiply(q_rows, k_tile, transpose=True)
      s = _scores(s, scale, softcap)
      slope = _slope(s, softcap)
      s = _hide(s, whole, lambda: (block[...], first[...], last[...]))
      p = jnp.exp2(s * unit - _along(lse_rows[...], 0, s.shape))
      (v_tile,) = values.wait()
      dp = work.multiply(dout_rows, v_tile, transpose=True)
      values.release()
      ds = p * (dp - _along(delta_rows[...], 0, s.shape)) * slope
      dq = work.multiply(ds.astype(q.dtype), k_tile, dq)
      keys.release()
      return dq

    start = jnp.zeros((wg.ROWS, dim), jnp.float32)
    return (work.loop(visit, start) * scale,)

  states = intervals.tile_states(mask, workers * wg.ROWS, wg.ROWS)
  share = heads // k.shape[2]
  return wg.Job(
      name="flash_backward_queries",
      body=body,
      grid=(batch, heads, length // (workers * wg.ROWS)),
      workers=workers,
      own=(
          wg.tokens(q), wg.tokens(dout), wg.shared(mask.block),
          wg.statistic(lse), wg.statistic(delta),
      ),
      streams=(
          (wg.tokens(k), wg.shared(mask.first), wg.shared(mask.last)),
          (wg.tokens(v),),
      ),
      width=wg.ROWS,
      visits=wg.visits(states),
      repeats=1,
      head=lambda head, _: lax.div(head, jnp.int32(share)),
      results=(wg.tokens(jax.ShapeDtypeStruct(q.shape, q.dtype)),),
      stages=(0,),
  )


def _keys_job(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    scale: float,
    softcap: float | None,
    wanted: Sequence[str],
) -> wg.Job:
  """The gradients of k and v, or one of them: `wanted` holds "dk", "dv".

  The heads of a group follow each other in one loop, so that their sum stays in
  the registers: it needs no memory, and no order of threads changes it.
  """
  batch, length, groups, dim = k.shape
  workers = 2 if dim <= _SMALL_DIM else 1
  unit = _unit(scale, softcap)
  share = q.shape[2] // groups

  def body(work: wg.Work) -> tuple[jax.Array, ...]:
    k_rows, v_rows, first, last = work.own

    def visit(whole: jax.Array, slots: list[wg.Slot], carry: Any) -> Any:
      grads = dict(zip(wanted, carry))
      queries, cotangents = slots
      q_tile, block, lse_tile = queries.wait()
      # Scores and probabilities lie transposed: keys are the rows.
      s = work.multiply(k_rows, q_tile, transpose=True)
      s = _scores(s, scale, softcap)
      slope = _slope(s, softcap)
      load = lambda: (block[...], first[...], last[...])
      s = _hide(s, whole, load, rows_are_queries=False)
      p = jnp.exp2(s * unit - _along(lse_tile[...], 1, s.shape))
      dout_tile, delta_tile = cotangents.wait()
      if "dv" in wanted:
        grads["dv"] = work.multiply(p.astype(q.dtype), dout_tile, grads["dv"])
      if "dk" in wanted:
        dp = work.multiply(v_rows, dout_tile, transpose=True)
        ds = p * (dp - _along(delta_tile[...], 1, s.shape)) * slope
        grads["dk"] = work.multiply(ds.astype(q.dtype), q_tile, grads["dk"])
      cotangents.release()
      queries.release()
      return tuple(grads[name] for name in wanted)

    start = tuple(jnp.zeros((wg.ROWS, dim), jnp.float32) for _ in wanted)
    grads = dict(zip(wanted, work.loop(visit, start)))
    if "dk" in wanted:
      grads["dk"] *= scale
    return tuple(grads[name] for name in wanted)

  states = intervals.tile_states(mask, wg.ROWS, workers * wg.ROWS)
  return wg.Job(
      name="flash_backward_keys",
      body=body,
      grid=(batch, groups, length // (workers * wg.ROWS)),
      workers=workers,
      own=(
          wg.tokens(k), wg.tokens(v),
          wg.shared(mask.first), wg.shared(mask.last),
      ),
      streams=(
          (wg.tokens(q), wg.shared(mask.block), wg.statistic(lse)),
          (wg.tokens(dout), wg.statistic(delta)),
      ),
      width=wg.ROWS,
      visits=wg.visits(states.swapaxes(1, 2)),
      repeats=share,
      head=lambda group, repeat: group * share + repeat,
      results=tuple(
          wg.tokens(jax.ShapeDtypeStruct(k.shape, k.dtype)) for _ in wanted
      ),
      stages=tuple(range(len(wanted))),
  )


# The contract of a backend; see `flash_attention.py`.


def _pad_mask(mask: Mask) -> Mask:
  """To whole tiles, and to one leading dimension for all three arrays."""
  queries, keys = mask.shape
  mask = intervals.pad(
      mask, queries + -queries % _LENGTH, keys + -keys % _LENGTH
  )
  rows = max(mask.block.shape[0], mask.first.shape[0], mask.last.shape[0])
  return jax.tree.map(
      lambda x: jnp.broadcast_to(x, (rows, x.shape[1])), mask
  )


def _pad_tokens(x: jax.Array) -> jax.Array:
  """[B, L, H, D] to whole tiles, with zeros."""
  length, dim = -x.shape[1] % _LENGTH, -x.shape[3] % _DIM
  return jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, dim)))


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """See `flash_attention.forward`; `interpret` runs it on any device."""
  _, length, _, dim = q.shape
  padded = map(_pad_tokens, (q, k, v))
  job = _forward_job(*padded, _pad_mask(mask), scale, softcap)
  out, lse = wg.launch(job, interpret)
  return out[:, :length, :, :dim], lse[:, :, :length]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `flash_attention.backward`; `lse` is +inf where a row sees nothing."""
  length, keys, dim = q.shape[1], k.shape[1], q.shape[3]
  rows = (0, 0), (0, 0), (0, -length % _LENGTH)
  # Padded queries are zero, and so are their cotangents: they add nothing.
  arguments = (
      *map(_pad_tokens, (q, k, v)),
      _pad_mask(mask),
      jnp.pad(lse * _LOG2E, rows),
      jnp.pad(delta, rows),
      _pad_tokens(dout),
      scale,
      softcap,
  )
  (dq,) = wg.launch(_queries_job(*arguments), interpret)
  # Two accumulators of a large head do not fit in the registers of a worker.
  passes = [("dk", "dv")] if dim <= _SMALL_DIM else [("dk",), ("dv",)]
  dk, dv = (
      grad
      for wanted in passes
      for grad in wg.launch(_keys_job(*arguments, wanted), interpret)
  )
  return (
      dq[:, :length, :, :dim], dk[:, :keys, :, :dim], dv[:, :keys, :, :dim]
  )
