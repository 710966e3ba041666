"""Vector-quantizer lookup in jnp: what a CPU runs, and what no kernel serves.

A loop over chunks of rows, and within it one over tiles of the codebook with a
running minimum. Scores are laid out [codes, rows], so that the minimum is taken
over the leading dimension: XLA:CPU vectorises that one only.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mmjax.kernels import device

# Rows in a chunk and codes in a tile: of those tried on a CPU, the smallest
# about as fast as the fastest. Elsewhere each step costs a few launches.
_ROWS, _CODES = 1024, 512
_MANY_ROWS, _MANY_CODES = 4096, 1024


def lookup(
    x: jax.Array, codebook: jax.Array, metric: str
) -> tuple[jax.Array, jax.Array]:
  """See `vq_lookup.vq_lookup`."""
  codes = comparable(codebook, metric)
  half = half_norms(codes, metric)

  def chunk(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    index = _nearest(x, codes, half)
    return index, _distance(x, codebook, index, metric)

  return _map_rows(chunk, x)


def residual(
    x: jax.Array, codebooks: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """See `vq_lookup.residual_vq`: a chunk of rows passes all levels at once."""
  half = half_norms(codebooks, "euclidean")

  def chunk(x: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    nearest = lambda rest, level: _nearest(rest, codebooks[level], half[level])
    return descend(x, codebooks, active, nearest)

  return _map_rows(chunk, x, active)


def descend(
    x: jax.Array,
    codebooks: jax.Array,
    active: jax.Array,
    nearest: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Quantises level after level what the levels before left over.

  Args:
    x: [N, D].
    codebooks: [Q, K, D].
    active: i32[N], levels that each row uses.
    nearest: maps the rest f32[N, D] and a level i32[] to the indices i32[N].

  Returns:
    i32[N, Q], -1 at unused levels; and the sum of the chosen rows, [N, D] in
    the dtype of x.
  """

  def one_level(rest_and_total: Any, level: jax.Array) -> Any:
    rest, total = rest_and_total
    index = nearest(rest, level)
    live = level < active
    chosen = codebooks[level, index].astype(jnp.float32)
    chosen = jnp.where(live[:, None], chosen, 0.0)
    return (rest - chosen, total + chosen), jnp.where(live, index, -1)

  rest = x.astype(jnp.float32)
  (_, total), codes = lax.scan(
      one_level, (rest, jnp.zeros_like(rest)), jnp.arange(codebooks.shape[0])
  )
  return codes.T, total.astype(x.dtype)


def distances(
    x: jax.Array, codebook: jax.Array, index: jax.Array, metric: str
) -> jax.Array:
  """f32[N], from the rows of x to the codebook's rows that `index` names."""
  chunk = lambda x, index: _distance(x, codebook, index, metric)
  return _map_rows(chunk, x, index)


def comparable(codebook: jax.Array, metric: str) -> jax.Array:
  """The codebook whose products with x decide: for cosine, unit vectors."""
  return _unit(codebook) if metric == "cosine" else codebook


def half_norms(codes: jax.Array, metric: str) -> jax.Array:
  """f32[..., K] from which the product with x is subtracted for the score.

  Nearest in Euclidean distance is the lowest |c|^2 / 2 - x.c; in angle, with
  unit vectors or zeros for codes, the lowest -x.c.
  """
  if metric == "cosine":
    return jnp.zeros(codes.shape[:-1], jnp.float32)
  return jnp.square(codes.astype(jnp.float32)).sum(axis=-1) / 2


def product(codes: jax.Array, x: jax.Array, axis: int = 1) -> jax.Array:
  """Contracts one axis of both in float32: one pass over pairs of bfloat16."""
  dtype = jnp.promote_types(codes.dtype, x.dtype)
  return lax.dot_general(
      codes.astype(dtype),
      x.astype(dtype),
      (((axis,), (axis,)), ((), ())),
      precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
  )


def _sizes() -> tuple[int, int]:
  """Rows in a chunk and codes in a tile."""
  on_cpu = device.platform(device.kind()) == "cpu"
  return (_ROWS, _CODES) if on_cpu else (_MANY_ROWS, _MANY_CODES)


def _nearest(x: jax.Array, codes: jax.Array, half: jax.Array) -> jax.Array:
  """i32[rows], the codes of the lowest scores of x [rows, D]."""
  count = codes.shape[0]
  size = min(_sizes()[1], count)

  def tile(j: jax.Array, carry: Any) -> Any:
    best, index = carry
    # The last tile may overlap the one before: codes seen twice win once.
    start = jnp.minimum(j * size, count - size)
    part = lambda x: lax.dynamic_slice_in_dim(x, start, size)
    score = part(half)[:, None] - product(part(codes), x)
    top = score.min(axis=0)
    code = start + lax.broadcasted_iota(jnp.int32, score.shape, 0)
    first = jnp.where(score == top, code, count).min(axis=0)
    # Never true of a NaN: such rows keep code 0.
    better = top < best
    return jnp.where(better, top, best), jnp.where(better, first, index)

  rows = x.shape[0]
  start = jnp.full(rows, jnp.inf), jnp.zeros(rows, jnp.int32)
  return lax.fori_loop(0, -(-count // size), tile, start)[1]


def _distance(
    x: jax.Array, codebook: jax.Array, index: jax.Array, metric: str
) -> jax.Array:
  chosen = codebook[index]
  if metric == "cosine":
    return 1.0 - (_unit(x) * _unit(chosen)).sum(axis=-1)
  difference = x.astype(jnp.float32) - chosen.astype(jnp.float32)
  return jnp.square(difference).sum(axis=-1)


def _unit(x: jax.Array) -> jax.Array:
  """Vectors of length 1 in float32; zeros stay zeros."""
  x = x.astype(jnp.float32)
  # The largest element first: its square could leave the range of a float.
  largest = jnp.abs(x).max(axis=-1, keepdims=True)
  x = x / jnp.where(largest == 0.0, 1.0, largest)
  norm = jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True))
  return x / jnp.where(norm == 0.0, 1.0, norm)


def _map_rows(f: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Maps chunks of rows, without a copy of the arrays.

  Args:
    f: maps the chunks of all arrays to a tree of arrays, row by row.
    *arrays: [N, ...]; the last chunk may overlap the one before.

  Returns:
    A tree of arrays [N, ...].
  """
  count = arrays[0].shape[0]
  size = min(_sizes()[0], count)
  chunk = [jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype) for a in arrays]
  out = jax.tree.map(
      lambda part: jnp.zeros((count, *part.shape[1:]), part.dtype),
      jax.eval_shape(f, *chunk),
  )

  def step(i: jax.Array, out: Any) -> Any:
    start = jnp.minimum(i * size, count - size)
    part = f(*(lax.dynamic_slice_in_dim(a, start, size) for a in arrays))
    write = lambda out, part: lax.dynamic_update_slice_in_dim(
        out, part, start, axis=0
    )
    return jax.tree.map(write, out, part)

  return lax.fori_loop(0, -(-count // size), step, out)
