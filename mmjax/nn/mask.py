"""Who sees whom? Visibility as data: intervals of blocks.

Each query carries one integer `block`, each key an interval `[first, last]`;
query q sees key k iff `first[k] <= block[q] <= last[k]`. That takes O(L) memory
where a boolean matrix takes O(L^2).
"""

import flax.struct
import jax
import jax.numpy as jnp

# Above every block number; "visible to all that follow".
LAST = jnp.iinfo(jnp.int32).max


@flax.struct.dataclass
class Mask:
  """An interval mask. A leading dimension of 1 is shared by the whole batch.

  Attributes:
    block: i32[B or 1, Q], one number per query.
    first: i32[B or 1, K], the lowest block that sees the key.
    last: i32[B or 1, K], the highest block that sees the key.
    pattern: what is known at trace time: "full", "causal" or "interval". It
      lets attention skip comparisons and choose a kernel; it never changes
      the result.
  """

  block: jax.Array
  first: jax.Array
  last: jax.Array
  pattern: str = flax.struct.field(pytree_node=False, default="interval")

  def dense(self) -> jax.Array:
    """bool[B or 1, Q, K], true where the query sees the key."""
    block = self.block[:, :, None]
    return (self.first[:, None] <= block) & (block <= self.last[:, None])


def full(queries: int, keys: int | None = None) -> Mask:
  """Every query sees every key."""
  zeros = jnp.zeros((1, queries if keys is None else keys), jnp.int32)
  return Mask(jnp.zeros((1, queries), jnp.int32), zeros, zeros, "full")


def causal(length: int) -> Mask:
  """Query i sees keys 0 .. i."""
  position = jnp.arange(length, dtype=jnp.int32)[None]
  return Mask(position, position, jnp.full_like(position, LAST), "causal")
