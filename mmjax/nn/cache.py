"""What have the layers seen? Keys and values of all layers, as a plain pytree.

A cache is made empty, handed to a call, and comes back with the call's tokens
in it. Rows may differ in length: a call's tokens are padded on the right, and
what a row adds beyond its own count is overwritten by its next tokens and seen
by none of them.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mmjax import sharding
from mmjax.kernels import decode_attention
from mmjax.nn import mask as masks
from mmjax.nn.mask import Mask


@flax.struct.dataclass
class Cache:
  """Keys and values of a stack of N layers with S slots.

  It is the carry of the scan over layers, so that each layer writes its part
  where it lies; donate it to the jitted step.

  Attributes:
    k: [N, B, G, S, D].
    v: [N, B, G, S, D].
    length: i32[B], how many slots of each row hold a token.
  """

  k: jax.Array
  v: jax.Array
  length: jax.Array

  @property
  def slots(self) -> int:
    """S."""
    return self.k.shape[3]

  def positions(self, count: int) -> jax.Array:
    """The places i32[B, count] of the next `count` tokens of each row."""
    return self.length[:, None] + jnp.arange(count, dtype=jnp.int32)

  def mask(self, count: int) -> Mask:
    """The next `count` tokens see all before them and are causal.

    Raises:
      ValueError: if they are more than the slots.
    """
    return masks.cached(self.length, count, self.slots)

  def write(
      self, layer: jax.Array | int, k: jax.Array, v: jax.Array
  ) -> "Cache":
    """Puts [B, T, G, D] behind what a layer holds; `length` stays.

    T slots must be left in each row (`length` + T <= S, padding included), or
    tokens are lost: with data on the device nobody can check.
    """
    append = decode_attention.append
    return self.replace(
        k=append(self.k, k, layer, self.length),
        v=append(self.v, v, layer, self.length),
    )

  def advanced(self, count: jax.Array | int) -> "Cache":
    """After all layers have written: `count`, an int or i32[B], are kept."""
    return self.replace(length=self.length + jnp.asarray(count, jnp.int32))


class CrossCache(NamedTuple):
  """What a decoder remembers that also looks at another sequence.

  Attributes:
    own: keys and values of its own tokens.
    seen: those of the other sequence, written once; a row sees `length` slots.
  """

  own: Cache
  seen: Cache

  def seen_mask(self, count: int) -> Mask:
    """`count` tokens see all of the other sequence."""
    slots = jnp.arange(self.seen.slots)
    return masks.padded(
        masks.full(count, self.seen.slots),
        slots < self.seen.length[:, None],
    )


def reordered(state: Any, index: jax.Array) -> Any:
  """The rows `index`, i32[B'], of caches of B rows: what beam search needs.

  Args:
    state: a cache, or any tree of caches.
    index: which rows, any number of them.
  """
  pick = lambda cache: Cache(
      cache.k[:, index], cache.v[:, index], cache.length[index]
  )
  is_cache = lambda node: isinstance(node, Cache)
  return jax.tree.map(pick, state, is_leaf=is_cache)


def empty(
    depth: int,
    batch: int,
    groups: int,
    slots: int,
    head_dim: int,
    dtype: Any,
) -> Cache:
  """A cache of `depth` layers without a token, in the shards of the mesh."""
  # Two arrays: one alone could not be donated twice.
  zeros = lambda: sharding.constrain(
      jnp.zeros((depth, batch, groups, slots, head_dim), dtype),
      None, "batch", "heads", None, None,
  )
  return Cache(zeros(), zeros(), jnp.zeros(batch, jnp.int32))
