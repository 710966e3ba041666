"""Flash attention in jnp: what a CPU runs, in memory linear in the length.

A loop over tiles of queries, and within it one over the tiles of keys that
somebody in the batch sees, with a running softmax (Milakov and
Gimelshein 2018).
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from mmjax.kernels import intervals
from mmjax.kernels.intervals import Mask

# Queries and keys in a tile.
_ROWS, _COLUMNS = 256, 512


class _Tiles(NamedTuple):
  """Arguments cut into tiles, the tile's number first.

  Attributes:
    q: [M, B, G, R * rows, D], the R heads of a group below each other.
    k: [N, B, G, columns, D].
    v: [N, B, G, columns, D].
    block: i32[M, B or 1, 1, 1, rows, 1].
    first: i32[N, B or 1, 1, 1, 1, columns].
    last: i32[N, B or 1, 1, 1, 1, columns].
    bias: [M, N, B or 1, G or 1, R or 1, rows, columns], or None.
    schedule: of the union of the batch, [M, N].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  block: jax.Array
  first: jax.Array
  last: jax.Array
  bias: jax.Array | None
  schedule: intervals.Schedule


def _tile_queries(x: jax.Array, groups: int, rows: int) -> jax.Array:
  """[B, Q, H, D] to [M, B, G, R * rows, D], zeros behind Q."""
  batch, length, heads, dim = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % rows), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, rows, groups, heads // groups, dim)
  x = x.transpose(1, 0, 3, 4, 2, 5)
  return x.reshape(*x.shape[:3], -1, dim)


def _untile_queries(x: jax.Array, length: int, rows: int) -> jax.Array:
  """The inverse of `_tile_queries`."""
  tiles, batch, groups, _, dim = x.shape
  x = x.reshape(tiles, batch, groups, -1, rows, dim)
  x = x.transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(batch, tiles * rows, -1, dim)[:, :length]


def _tile_keys(x: jax.Array, columns: int) -> jax.Array:
  """[B, K, G, D] to [N, B, G, columns, D], zeros behind K."""
  batch, length, groups, dim = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % columns), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, columns, groups, dim)
  return x.transpose(1, 0, 3, 2, 4)


def _untile_keys(x: jax.Array, length: int) -> jax.Array:
  """The inverse of `_tile_keys`."""
  x = x.transpose(1, 0, 3, 2, 4)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _tile_bias(
    bias: jax.Array, groups: int, rows: int, columns: int
) -> jax.Array:
  """[B or 1, H or 1, Q, K] to [M, N, B or 1, G or 1, R or 1, rows, columns]."""
  batch, heads, queries, keys = bias.shape
  widths = (0, 0), (0, 0), (0, -queries % rows), (0, -keys % columns)
  bias = jnp.pad(bias, widths)
  groups = groups if heads > 1 else 1
  m, n = bias.shape[2] // rows, bias.shape[3] // columns
  bias = bias.reshape(batch, groups, heads // groups, m, rows, n, columns)
  return bias.transpose(3, 5, 0, 1, 2, 4, 6)


def _untile_bias(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_tile_bias`."""
  batch, heads, queries, keys = shape
  m, n, _, _, _, rows, columns = x.shape
  x = x.transpose(2, 3, 4, 0, 5, 1, 6)
  x = x.reshape(batch, heads, m * rows, n * columns)
  return x[:, :, :queries, :keys]


def _tile(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
) -> tuple[_Tiles, int]:
  """All arguments in tiles, and the rows of a tile."""
  queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
  rows, columns = min(_ROWS, queries), min(_COLUMNS, keys)
  mask = intervals.pad(
      mask, queries + -queries % rows, keys + -keys % columns
  )
  # The highest state is not hidden if that of any row of the batch is not.
  states = intervals.tile_states(mask, rows, columns)
  cut = lambda x, size: x.reshape(x.shape[0], -1, size).swapaxes(0, 1)
  block, first, last = (
      cut(mask.block, rows), cut(mask.first, columns), cut(mask.last, columns)
  )
  return _Tiles(
      q=_tile_queries(q, groups, rows),
      k=_tile_keys(k, columns),
      v=_tile_keys(v, columns),
      block=block[:, :, None, None, :, None],
      first=first[:, :, None, None, None, :],
      last=last[:, :, None, None, None, :],
      bias=None if bias is None else _tile_bias(bias, groups, rows, columns),
      schedule=intervals.schedule(states.max(axis=0)),
  ), rows


def _scores(
    tiles: _Tiles, i: jax.Array, j: jax.Array, scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores of tile (i, j) in float32, without the mask.

  Returns:
    The scores f32[B, G, R, rows, columns], the derivative of the softcap (or
    1.0), and which scores are visible, broadcastable to them.
  """
  s = jnp.einsum(
      "bgqd,bgkd->bgqk", tiles.q[i], tiles.k[j],
      preferred_element_type=jnp.float32,
  )
  rows = tiles.block.shape[-2]
  s = s.reshape(*s.shape[:2], -1, rows, s.shape[-1]) * scale
  if tiles.bias is not None:
    s += tiles.bias[i, j]
  slope = jnp.float32(1.0)
  if softcap is not None:
    capped = jnp.tanh(s / softcap)
    s, slope = softcap * capped, 1.0 - capped**2
  block = tiles.block[i]
  return s, slope, (tiles.first[j] <= block) & (block <= tiles.last[j])


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """See `flash_attention.forward`."""
  tiles, rows = _tile(q, k, v, mask, bias)
  count, batch, groups, height, dim = tiles.q.shape
  shape = batch, groups, height // rows, rows, 1

  def one_tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    def visit(step: jax.Array, carry: Any) -> Any:
      top, total, acc = carry
      j = tiles.schedule.order[i, step]
      s, _, visible = _scores(tiles, i, j, scale, softcap)
      s = jnp.where(visible, s, -jnp.inf)
      new = jnp.maximum(top, s.max(axis=-1, keepdims=True))
      # A row without a key so far must not compute inf - inf.
      base = jnp.where(new == -jnp.inf, 0.0, new)
      p = jnp.exp(s - base)
      shrink = jnp.exp(top - base)
      p_flat = p.reshape(batch, groups, height, -1).astype(v.dtype)
      gained = jnp.einsum(
          "bgqk,bgkd->bgqd", p_flat, tiles.v[j],
          preferred_element_type=jnp.float32,
      )
      acc = acc * shrink.reshape(batch, groups, height, 1) + gained
      return new, total * shrink + p.sum(axis=-1, keepdims=True), acc

    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((batch, groups, height, dim), jnp.float32),
    )
    top, total, acc = lax.fori_loop(
        0, tiles.schedule.count[i], visit, start
    )
    empty = total == 0.0
    out = acc / jnp.where(empty, 1.0, total).reshape(*acc.shape[:3], 1)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
    return out.astype(q.dtype), lse[..., 0]

  out, lse = lax.map(one_tile, jnp.arange(count))
  out = _untile_queries(out, q.shape[1], rows)
  lse = lse.transpose(1, 2, 3, 0, 4).reshape(batch, q.shape[2], -1)
  return out, lse[:, :, : q.shape[1]]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    bias: jax.Array | None,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """See `flash_attention.backward`; `lse` is +inf where a row sees nothing."""
  tiles, rows = _tile(q, k, v, mask, bias)
  count, batch, groups, height, _ = tiles.q.shape
  douts = _tile_queries(dout, groups, rows)

  def per_row(x: jax.Array, fill: float) -> jax.Array:
    """f32[B, H, Q] to [M, B, G, R, rows, 1]."""
    widths = (0, 0), (0, 0), (0, -x.shape[2] % rows)
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(batch, groups, -1, count, rows, 1)
    return x.transpose(3, 0, 1, 2, 4, 5)

  # Padded queries have no probabilities, hence no gradients.
  lses, deltas = per_row(lse, jnp.inf), per_row(delta, 0.0)

  def one_tile(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
    def visit(step: jax.Array, carry: Any) -> Any:
      dq, dk, dv, dbias = carry
      j = tiles.schedule.order[i, step]
      s, slope, visible = _scores(tiles, i, j, scale, softcap)
      p = jnp.where(visible, jnp.exp(s - lses[i]), 0.0)
      dp = jnp.einsum(
          "bgqd,bgkd->bgqk", douts[i], tiles.v[j],
          preferred_element_type=jnp.float32,
      ).reshape(p.shape)
      ds = p * (dp - deltas[i]) * slope
      flat = lambda x: x.reshape(batch, groups, height, -1).astype(q.dtype)
      dv = dv.at[j].add(jnp.einsum(
          "bgqk,bgqd->bgkd", flat(p), douts[i],
          preferred_element_type=jnp.float32,
      ))
      if dbias is not None:
        axes = [a for a in (0, 1, 2) if dbias.shape[2 + a] == 1]
        dbias = dbias.at[i, j].add(ds.sum(axes, keepdims=True))
      ds = flat(ds * scale)
      dk = dk.at[j].add(jnp.einsum(
          "bgqk,bgqd->bgkd", ds, tiles.q[i],
          preferred_element_type=jnp.float32,
      ))
      dq += jnp.einsum(
          "bgqk,bgkd->bgqd", ds, tiles.k[j],
          preferred_element_type=jnp.float32,
      )
      return dq, dk, dv, dbias

    dq = jnp.zeros(tiles.q.shape[1:], jnp.float32)
    dq, *carry = lax.fori_loop(
        0, tiles.schedule.count[i], visit, (dq, *carry)
    )
    return tuple(carry), dq.astype(q.dtype)

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = (
      zeros(tiles.k), zeros(tiles.v),
      None if tiles.bias is None else zeros(tiles.bias),
  )
  (dk, dv, dbias), dq = lax.scan(one_tile, start, jnp.arange(count))
  return (
      _untile_queries(dq, q.shape[1], rows),
      _untile_keys(dk, k.shape[1]).astype(k.dtype),
      _untile_keys(dv, k.shape[1]).astype(v.dtype),
      None if bias is None
      else _untile_bias(dbias, bias.shape).astype(bias.dtype),
  )
