"""One or few queries against a long cache of keys and values.

The cache holds all layers, heads in front: [N, B, G, S, D]. It is written and
read where it lies, so that it can be the carry of a scan over layers and no
layer is ever copied. Only tiles that a row of the batch sees are read: a step
costs what the cache holds, not what it has room for.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mmjax.kernels import device, intervals
from mmjax.kernels.intervals import Mask

IMPLEMENTATIONS = ("tpu", "jnp")

# Slots in a tile.
_COLUMNS = 512

# Rows that the kernel computes at once are a multiple of this: the sublanes of
# bfloat16.
_SUBLANES = 16

_FLOOR = float(jnp.finfo(jnp.float32).min)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
  """Attention of new tokens to a cache that holds them already.

  Args:
    q: [B, T, H, D], T small; H must be a multiple of G.
    k: [N, B, G, S, D], the cache; what the mask hides may be anything finite.
    v: [N, B, G, S, D].
    layer: i32[], which of the N to attend to.
    mask: which slots a query sees, for example `nn.mask.cached`.
    scale: as in `flash_attention`.
    softcap: likewise.
    implementation: "tpu", Pallas, or "jnp"; by default the device decides.

  Returns:
    [B, T, H, D] in the dtype of q; zeros for a query that sees nothing.

  Raises:
    ValueError: for shapes that do not fit together, or an unknown
      implementation.
  """
  _check(q, k, v, mask)
  if implementation is None:
    on_tpu = device.platform(device.kind()) == "tpu"
    implementation = "tpu" if on_tpu else "jnp"
  name = implementation.removesuffix(device.INTERPRET)
  if name not in IMPLEMENTATIONS:
    raise ValueError(
        f"decode attention: implementation={implementation!r}; expected one of "
        f"{list(IMPLEMENTATIONS)}"
    )
  batch, count, heads, dim = q.shape
  groups = k.shape[2]
  # The heads of a group stand below each other: rows of one product.
  rows = q.reshape(batch, count, groups, heads // groups, dim)
  rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)
  mask = mask.replace(
      block=jnp.tile(mask.block, (1, heads // groups)), pattern="interval"
  )
  if name == "tpu":
    out = _tpu(
        rows, k, v, layer, mask, scale, softcap, name != implementation
    )
  else:
    out = _jnp(rows, k, v, layer, mask, scale, softcap)
  out = out.reshape(batch, groups, heads // groups, count, dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def append(
    cache: jax.Array,
    new: jax.Array,
    layer: jax.Array | int,
    start: jax.Array,
) -> jax.Array:
  """Writes new keys or values behind those that a cache holds.

  With the cache donated to the jitted step, the write is in place.

  Args:
    cache: [N, B, G, S, D].
    new: [B, T, G, D].
    layer: i32[], which of the N to write to.
    start: i32[B], the slot of each row's first new token. What lands behind the
      last slot is dropped.

  Returns:
    The cache with `new` in slots start .. start + T - 1 of the layer.
  """
  batch, tokens, groups, _ = new.shape
  rows = jnp.arange(batch)[:, None, None]
  heads = jnp.arange(groups)[:, None]
  slots = (start[:, None] + jnp.arange(tokens))[:, None]
  # One scatter whose every window is one vector: of the ways to say this, XLA
  # writes few others in place, and none of the shorter ones.
  return cache.at[layer, rows, heads, slots].set(
      new.swapaxes(1, 2).astype(cache.dtype), mode="drop"
  )


def _check(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> None:
  faults = []
  if q.ndim != 4 or k.ndim != 5:
    faults.append("expected q [B, T, H, D] and k [N, B, G, S, D]")
  elif q.shape[0] != k.shape[1] or q.shape[3] != k.shape[4]:
    faults.append("B and D must agree")
  elif q.shape[2] % k.shape[2]:
    faults.append(f"{q.shape[2]} heads are no multiple of {k.shape[2]} groups")
  elif mask.shape != (q.shape[1], k.shape[3]):
    faults.append(f"the mask is of {mask.shape}")
  if k.shape != v.shape:
    faults.append("k and v must agree")
  if faults:
    raise ValueError(
        f"decode attention: q is {q.shape}, k {k.shape}, v {v.shape}: "
        + "; ".join(faults)
    )


def _states(mask: Mask, columns: int) -> jax.Array:
  """States of the tiles of slots, i32[B or 1, tiles]."""
  keys = mask.shape[1] + -mask.shape[1] % columns
  mask = intervals.pad(mask, mask.shape[0], keys)
  return intervals.tile_states(mask, mask.shape[0], columns)[:, 0]


def _jnp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> jax.Array:
  """A loop over the tiles that somebody in the batch sees.

  Args:
    q: [B, G, R, D], R rows for each head of keys.
    k: [N, B, G, S, D].
    v: [N, B, G, S, D].
    layer: of the N.
    mask: of R rows.
    scale: factor on the dot products.
    softcap: see `decode_attention`.

  Returns:
    [B, G, R, D] in the dtype of q.
  """
  slots = k.shape[3]
  columns = min(_COLUMNS, slots)
  order, count = intervals.schedule(_states(mask, columns).max(axis=0))

  def visit(step: jax.Array, carry: Any) -> Any:
    top, total, acc = carry
    # The last tile is moved back to end with the cache; what it shares with
    # the one before is not counted again.
    begin = order[step] * columns
    at = jnp.minimum(begin, slots - columns)
    tile = lambda x: lax.dynamic_slice(
        x, (layer, 0, 0, at, 0), (1, *x.shape[1:3], columns, x.shape[4])
    )[0]
    s = scale * jnp.einsum(
        "bgrd,bgkd->bgrk", q, tile(k), preferred_element_type=jnp.float32
    )
    if softcap is not None:
      s = softcap * jnp.tanh(s / softcap)
    block = mask.block[:, None, :, None]
    first, last = (
        lax.dynamic_slice_in_dim(x, at, columns, axis=1)[:, None, None]
        for x in (mask.first, mask.last)
    )
    fresh = at + jnp.arange(columns) >= begin
    visible = (first <= block) & (block <= last) & fresh
    s = jnp.where(visible, s, -jnp.inf)
    new = jnp.maximum(top, s.max(axis=-1, keepdims=True))
    p, shrink = jnp.exp(s - new), jnp.exp(top - new)
    gained = jnp.einsum(
        "bgrk,bgkd->bgrd", p.astype(v.dtype), tile(v),
        preferred_element_type=jnp.float32,
    )
    total = total * shrink + p.sum(axis=-1, keepdims=True)
    return new, total, acc * shrink + gained

  one = (*q.shape[:3], 1)
  _, total, acc = lax.fori_loop(
      0, count, visit,
      (
          jnp.full(one, _FLOOR, jnp.float32),
          jnp.zeros(one, jnp.float32),
          jnp.zeros(q.shape, jnp.float32),
      ),
  )
  return (acc / jnp.where(total == 0.0, 1.0, total)).astype(q.dtype)


def _tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    mask: Mask,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
  """The Mosaic kernel; arguments and result of `_jnp`."""
  batch, groups, count, dim = q.shape
  rows = count + -count % _SUBLANES
  slots = k.shape[3]
  columns = min(_COLUMNS, slots)
  q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - count), (0, 0)))
  mask = intervals.pad(mask, rows, slots)
  order, visits = intervals.schedule(_states(mask, columns))
  order = jnp.broadcast_to(order, (batch, order.shape[1]))
  visits = jnp.broadcast_to(visits, (batch,))
  block = jnp.broadcast_to(mask.block, (batch, rows))[..., None]
  bounds = jnp.stack(jnp.broadcast_arrays(mask.first, mask.last), axis=1)
  bounds = jnp.broadcast_to(bounds, (batch, 2, slots))

  at = lambda index: lambda b, g, step, layer, order, visits: index(
      b, g, layer[0], order[b, step]
  )
  row = pl.BlockSpec(
      (None, None, rows, dim), at(lambda b, g, layer, j: (b, g, 0, 0))
  )
  tile = pl.BlockSpec(
      (None, None, None, columns, dim),
      at(lambda b, g, layer, j: (layer, b, g, j, 0)),
  )
  # At least one step, to write the zeros of a batch that sees nothing.
  steps = jnp.maximum(visits.max(), 1)
  nbytes = 2 * (k.size // k.shape[0]) * k.dtype.itemsize
  out = pl.pallas_call(
      functools.partial(_kernel, slots=slots, scale=scale, softcap=softcap),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3,
          grid=(batch, groups, steps),
          in_specs=[
              row, tile, tile,
              pl.BlockSpec(
                  (None, rows, 1), at(lambda b, g, layer, j: (b, 0, 0))
              ),
              pl.BlockSpec(
                  (None, 2, columns), at(lambda b, g, layer, j: (b, 0, j))
              ),
          ],
          out_specs=row,
          scratch_shapes=[
              pltpu.VMEM((rows, 1), jnp.float32),
              pltpu.VMEM((rows, 1), jnp.float32),
              pltpu.VMEM((rows, dim), jnp.float32),
          ],
      ),
      out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      # At most: what the cache holds is data.
      cost_estimate=pl.CostEstimate(
          flops=4 * batch * groups * rows * slots * dim,
          transcendentals=batch * groups * rows * slots,
          bytes_accessed=nbytes + 2 * q.size * q.dtype.itemsize,
      ),
      interpret=interpret,
  )(jnp.full(1, layer, jnp.int32), order, visits, q, k, v, block, bounds)
  return out[:, :, :count]


def _kernel(
    layer: Any,
    order: Any,
    visits: Any,
    q: Any,
    k: Any,
    v: Any,
    block: Any,
    bounds: Any,
    out: Any,
    top: Any,
    total: Any,
    acc: Any,
    *,
    slots: int,
    scale: float,
    softcap: float | None,
) -> None:
  """One tile of slots: references to prefetched scalars, tiles and scratch."""
  del layer  # The index maps read it.
  columns = k.shape[0]
  precision = lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
  b, step = pl.program_id(0), pl.program_id(2)

  @pl.when(step == 0)
  def _begin() -> None:
    top[...] = jnp.full_like(top, _FLOOR)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  @pl.when(step < visits[b])
  def _visit() -> None:
    s = scale * lax.dot_general(
        q[...], k[...], (((1,), (1,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )
    if softcap is not None:
      s = softcap * jnp.tanh(s / softcap)
    first, last = bounds[:1], bounds[1:]
    # Behind the end of the cache the copy of a tile is not defined.
    slot = lax.broadcasted_iota(jnp.int32, (1, columns), 1)
    inside = slot < slots - order[b, step] * columns
    visible = (first <= block[...]) & (block[...] <= last) & inside
    s = jnp.where(visible, s, -jnp.inf)
    new = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
    p, shrink = jnp.exp(s - new), jnp.exp(top[...] - new)
    values = jnp.where(inside.T, v[...], 0) if slots % columns else v[...]
    gained = lax.dot_general(
        p.astype(v.dtype), values, (((1,), (0,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )
    total[...] = total[...] * shrink + p.sum(axis=1, keepdims=True)
    acc[...] = acc[...] * shrink + gained
    top[...] = new

  @pl.when(step == pl.num_programs(2) - 1)
  def _end() -> None:
    whole = total[...]
    out[...] = (acc[...] / jnp.where(whole == 0.0, 1.0, whole)).astype(
        out.dtype
    )
