"""Who sees whom? Visibility as data, and the tiles of it that need work.

Each query carries one integer `block`, each key an interval `[first, last]`;
query q sees key k iff `first[k] <= block[q] <= last[k]`. That takes O(L) memory
where a boolean matrix takes O(L^2), and it is an array: a mask may change with
every batch without a new compilation. (Anchors: the block mask of
FlexAttention, Dong et al. 2024; the column intervals of FlashMask, Wang et al.
2024.)
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# Below and above every block number that may be used.
LOWEST = jnp.iinfo(jnp.int32).min
LAST = jnp.iinfo(jnp.int32).max

# What a tile of queries and keys is: its state.
HIDDEN, PARTIAL, WHOLE = 0, 1, 2


@flax.struct.dataclass
class Mask:
  """An interval mask. A leading dimension of 1 is shared by the whole batch.

  Attributes:
    block: i32[B or 1, Q], one number per query.
    first: i32[B or 1, K], the lowest block that sees the key.
    last: i32[B or 1, K], the highest block that sees the key; below `first`
      for a key that nobody sees.
    pattern: what is known at trace time: "full", "causal" or "interval". It
      lets attention skip comparisons and choose a kernel; it never changes
      the result.
  """

  block: jax.Array
  first: jax.Array
  last: jax.Array
  pattern: str = flax.struct.field(pytree_node=False, default="interval")

  @property
  def shape(self) -> tuple[int, int]:
    """(Q, K)."""
    return self.block.shape[1], self.first.shape[1]

  def dense(self) -> jax.Array:
    """bool[B or 1, Q, K], true where the query sees the key."""
    block = self.block[:, :, None]
    return (self.first[:, None] <= block) & (block <= self.last[:, None])


def pad(mask: Mask, queries: int, keys: int) -> Mask:
  """Lengthens a mask to [*, queries] and [*, keys].

  Nobody sees the new keys. The new queries see what the last one sees, so that
  they change no bound of a tile; their results mean nothing. The pattern stays,
  and speaks of the old queries and keys only.
  """
  rows = ((0, 0), (0, queries - mask.shape[0]))
  columns = ((0, 0), (0, keys - mask.shape[1]))
  return Mask(
      block=jnp.pad(mask.block, rows, mode="edge"),
      first=jnp.pad(mask.first, columns, constant_values=LAST),
      last=jnp.pad(mask.last, columns, constant_values=LOWEST),
      pattern=mask.pattern,
  )


def tile_states(mask: Mask, rows: int, columns: int) -> jax.Array:
  """What each tile of `rows` queries and `columns` keys is.

  Args:
    mask: with Q a multiple of `rows` and K of `columns`; see `pad`.
    rows: queries in a tile.
    columns: keys in a tile.

  Returns:
    i32[B or 1, Q / rows, K / columns] of `HIDDEN`, `PARTIAL` and `WHOLE`. The
    bounds of a tile decide: `HIDDEN` and `WHOLE` are certain, and a `PARTIAL`
    tile may still be one of them.
  """
  tiles = lambda x, size: x.reshape(x.shape[0], -1, size)
  block = tiles(mask.block, rows)
  low, high = block.min(-1)[:, :, None], block.max(-1)[:, :, None]
  first, last = tiles(mask.first, columns), tiles(mask.last, columns)
  bound = lambda x: x[:, None]
  hidden = (high < bound(first.min(-1))) | (low > bound(last.max(-1)))
  whole = (bound(first.max(-1)) <= low) & (high <= bound(last.min(-1)))
  return jnp.where(hidden, HIDDEN, jnp.where(whole, WHOLE, PARTIAL))


def visible_pairs(mask: Mask) -> np.ndarray:
  """How many pairs of a query and a key see each other: i64[B or 1].

  On the host, in time L log L.
  """
  arrays = [np.asarray(x) for x in (mask.block, mask.first, mask.last)]
  batch = max(len(x) for x in arrays)
  pairs = np.zeros(batch, np.int64)
  for n in range(batch):
    block, first, last = (x[n % len(x)] for x in arrays)
    block = np.sort(block)
    below = np.searchsorted(block, first, side="left")
    until = np.searchsorted(block, last, side="right")
    pairs[n] = np.maximum(until - below, 0).sum()
  return pairs


class Schedule(NamedTuple):
  """Which tiles of the inner loop does each step of the outer one visit?

  Attributes:
    order: i32[..., M, N], the inner tiles that are not hidden in increasing
      order, then the last of them again and again (0 if there is none): a
      pipeline that follows it to the end copies nothing twice.
    count: i32[..., M], how many are not hidden.
  """

  order: jax.Array
  count: jax.Array


def schedule(states: jax.Array) -> Schedule:
  """The schedule of `tile_states` [..., M, N]; swap the axes for keys first."""
  hidden = states == HIDDEN
  order = jnp.argsort(hidden, axis=-1, stable=True).astype(jnp.int32)
  count = jnp.sum(~hidden, axis=-1, dtype=jnp.int32)
  step = jnp.arange(states.shape[-1], dtype=jnp.int32)
  step = jnp.minimum(step, jnp.maximum(count[..., None] - 1, 0))
  return Schedule(jnp.take_along_axis(order, step, axis=-1), count)
