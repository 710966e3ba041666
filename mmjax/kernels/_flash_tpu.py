"""Attention under an interval mask as Mosaic kernels for TPU.

Three kernels, forward, dq and dk/dv (FlashAttention-2, Dao 2023). They walk
over the tiles that somebody sees, see `_flash_tpu_grid`, and everything in them
is turned by 90 degrees: arrays are [B, H, D, L] and scores [keys, queries].
What belongs to a query (maximum, sum, log-sum-exp, delta, block) is then a row
along the lanes, reductions run over sublanes, and a head size below 128 wastes
neither lanes nor memory.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mmjax.kernels import _flash_tpu_grid as grids
from mmjax.kernels import intervals
from mmjax.kernels._flash_tpu_grid import Plan, Step
from mmjax.kernels.intervals import PARTIAL, WHOLE, Mask

# Below every score, and finite: a row without a key so far must not compute
# inf - inf.
_FLOOR = float(jnp.finfo(jnp.float32).min)

# The exponentials are powers of two, which is what the hardware computes.
_LOG2_E = math.log2(math.e)


def refusal(q_shape: tuple[int, ...], dtype: Any) -> str:
  """Why the kernels cannot serve a call; empty if they can."""
  if q_shape[3] > grids.MAX_HEAD_DIM:
    return f"head size {q_shape[3]} is above {grids.MAX_HEAD_DIM}"
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"{jnp.dtype(dtype)} is neither float32 nor bfloat16"
  return ""


# Fills what nobody sees of an array [columns, rows].
_Hide = Callable[[jax.Array, float], jax.Array]


def _visit(
    plan: Plan,
    step: Step,
    update: Callable[[_Hide], None],
    mask: Sequence[Any],
) -> None:
  """Calls `update` on a tile that somebody sees.

  Args:
    plan: of the call.
    step: where the kernel is.
    update: is traced twice, for whole and for partly visible tiles; only the
      latter pay for the comparison.
    mask: references to the block [1, rows] and the bounds [2, columns] of the
      tile, or none.
  """

  @pl.when(step.state == WHOLE)
  def _whole() -> None:
    update(lambda x, fill: x)

  @pl.when(step.state == PARTIAL)
  def _partial() -> None:
    visible = _visible(plan, step, *mask)
    update(lambda x, fill: jnp.where(visible, x, fill))


def _visible(
    plan: Plan, step: Step, block: Any = None, bounds: Any = None
) -> jax.Array:
  """bool[columns, rows], true where the query sees the key."""
  if plan.pattern == "interval":
    # As columns they would fill 128 lanes each on their way from HBM.
    bounds = bounds[...].T
    first, last = bounds[:, :1], bounds[:, 1:]
    return (first <= block[...]) & (block[...] <= last)
  limit = jnp.full((1, plan.rows), plan.keys - 1, jnp.int32)
  if plan.pattern == "causal":
    query = lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1)
    limit = jnp.minimum(limit, query + step.i * plan.rows)
  key = lax.broadcasted_iota(jnp.int32, (plan.columns, plan.rows), 0)
  return key <= limit - step.j * plan.columns


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
  """The product of two matrices over one axis of each, in float32.

  Float32 products are exact to float32, which takes the matrix unit six passes.
  """
  return lax.dot_general(
      x, y, (((over[0],), (over[1],)), ((), ())),
      precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
  )


def _scores(
    plan: Plan, q: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
  """f32[columns, rows] in units of log 2, and the slope of the softcap."""
  s, cap = _dot(k, q, (0, 0)), plan.softcap
  if cap is None:
    return s * (plan.scale * _LOG2_E), 1.0
  capped = jnp.tanh(s * (plan.scale / cap))
  return capped * (cap * _LOG2_E), 1.0 - capped * capped


def _forward_kernel(
    plan: Plan, step: Step, q: Any, k: Any, v: Any, *refs: Any
) -> None:
  *mask, out, lse, top, total, acc = refs

  @pl.when(step.begins)
  def _begin() -> None:
    top[...] = jnp.full_like(top, _FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def update(hide: _Hide) -> None:
    s, _ = _scores(plan, q[...], k[...])
    s = hide(s, -jnp.inf)
    new = jnp.maximum(top[...], s.max(axis=0, keepdims=True))
    p, shrink = jnp.exp2(s - new), jnp.exp2(top[...] - new)
    gained = _dot(v[...], p.astype(v.dtype), (1, 0))
    total[...] = total[...] * shrink + p.sum(axis=0, keepdims=True)
    acc[...] = acc[...] * shrink + gained
    top[...] = new

  _visit(plan, step, update, mask)

  @pl.when(step.ends)
  def _end() -> None:
    empty = total[...] == 0.0
    out[...] = (acc[...] / jnp.where(empty, 1.0, total[...])).astype(out.dtype)
    lse[...] = jnp.where(
        empty, -jnp.inf, top[...] / _LOG2_E + jnp.log(total[...])
    )


def _gradient(
    plan: Plan, hide: _Hide, operands: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
  """Probabilities and gradient of the scores, [columns, rows], both cast."""
  q, k, v, lse, delta, dout = operands
  s, slope = _scores(plan, q[...], k[...])
  p = hide(jnp.exp2(s - lse[...]), 0.0)
  dp = _dot(v[...], dout[...], (0, 0))
  ds = p * (dp - delta[...]) * slope
  return p.astype(v.dtype), ds.astype(v.dtype)


def _dq_kernel(plan: Plan, step: Step, *refs: Any) -> None:
  *operands, dq, acc = refs
  operands, mask = operands[:6], operands[6:]

  @pl.when(step.begins)
  def _begin() -> None:
    acc[...] = jnp.zeros_like(acc)

  def update(hide: _Hide) -> None:
    _, ds = _gradient(plan, hide, operands)
    acc[...] += _dot(operands[1][...], ds, (1, 0))

  _visit(plan, step, update, mask)

  @pl.when(step.ends)
  def _end() -> None:
    dq[...] = (acc[...] * plan.scale).astype(dq.dtype)


def _dkv_kernel(plan: Plan, step: Step, *refs: Any) -> None:
  *operands, dk, dv, dk_acc, dv_acc = refs
  operands, mask = operands[:6], operands[6:]

  @pl.when(step.begins)
  def _begin() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  def update(hide: _Hide) -> None:
    p, ds = _gradient(plan, hide, operands)
    q, dout = operands[0], operands[5]
    dv_acc[...] += _dot(dout[...], p, (1, 1))
    dk_acc[...] += _dot(q[...], ds, (1, 1))

  _visit(plan, step, update, mask)

  @pl.when(step.ends)
  def _end() -> None:
    dk[...] = (dk_acc[...] * plan.scale).astype(dk.dtype)
    dv[...] = dv_acc[...].astype(dv.dtype)


# What the rest of the house calls.


def _turn(x: jax.Array, length: int) -> jax.Array:
  """[B, L, H, D] to [B, H, D, length], zeros behind L."""
  x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
  return x.transpose(0, 2, 3, 1)


def _turn_back(x: jax.Array, length: int) -> jax.Array:
  """The inverse of `_turn`."""
  return x[..., :length].transpose(0, 3, 1, 2)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
    tiles: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """See `flash_attention.forward`; `tiles` overrides `tile_sizes`."""
  plan = grids.make_plan(q, k, mask, scale, softcap, interpret, tiles)
  queries, keys = plan.padded
  mask = intervals.pad(mask, queries, keys)
  out, lse = grids.run(
      plan,
      _forward_kernel,
      intervals.tile_states(mask, plan.rows, plan.columns),
      [_turn(q, queries), _turn(k, keys), _turn(v, keys),
       *grids.mask_operands(plan, mask)],
      lambda grid: [grid.of_queries(plan.dim), grid.of_keys(), grid.of_keys(),
                    *grid.of_mask()],
      lambda grid: [grid.of_queries(plan.dim), grid.of_queries(1)],
      [jax.ShapeDtypeStruct((plan.batch, plan.heads, height, queries), dtype)
       for height, dtype in ((plan.dim, q.dtype), (1, jnp.float32))],
      [(1, plan.rows), (1, plan.rows), (plan.dim, plan.rows)],
      products=2,
  )
  return _turn_back(out, plan.queries), lse[:, :, 0, : plan.queries]


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
    tiles: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `flash_attention.backward`; `lse` is +inf where a row sees nothing."""
  plan = grids.make_plan(q, k, mask, scale, softcap, interpret, tiles)
  queries, keys = plan.padded
  mask = intervals.pad(mask, queries, keys)
  fill = ((0, 0), (0, 0), (0, queries - plan.queries))
  # Padded queries have no probabilities, hence no gradients.
  lse = jnp.pad(lse * _LOG2_E, fill, constant_values=jnp.inf)
  operands = [
      _turn(q, queries), _turn(k, keys), _turn(v, keys), lse[:, :, None],
      jnp.pad(delta, fill)[:, :, None], _turn(dout, queries),
      *grids.mask_operands(plan, mask),
  ]
  in_specs = lambda grid: [
      grid.of_queries(plan.dim), grid.of_keys(), grid.of_keys(),
      grid.of_queries(1), grid.of_queries(1), grid.of_queries(plan.dim),
      *grid.of_mask(),
  ]
  states = intervals.tile_states(mask, plan.rows, plan.columns)
  result = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  run = functools.partial(
      grids.run, plan, states=states, operands=operands, in_specs=in_specs
  )
  (dq,) = run(
      kernel=_dq_kernel,
      out_specs=lambda grid: [grid.of_queries(plan.dim)],
      out_shape=[result(operands[0])],
      scratch=[(plan.dim, plan.rows)],
      products=3,
  )
  dk, dv = run(
      kernel=_dkv_kernel,
      out_specs=lambda grid: [grid.of_keys(), grid.of_keys()],
      out_shape=[result(operands[1]), result(operands[2])],
      scratch=[(plan.dim, plan.columns)] * 2,
      keys_first=True,
      products=4,
  )
  return (
      _turn_back(dq, plan.queries),
      _turn_back(dk, plan.keys),
      _turn_back(dv, plan.keys),
  )
