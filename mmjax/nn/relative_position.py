"""How far is a key from a query? Learned biases on the scores of attention."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmjax import config
from mmjax.nn.partitioning import Initializer, declared, param

# What a query may look at: keys on both sides, or itself and what came before.
SIDES = ("both", "past")


def bucket(
    distance: np.ndarray, buckets: int, longest: int, sides: str
) -> np.ndarray:
  """The bucket of a distance (Raffel et al. 2020, section 2.1).

  Half of the buckets of a side hold one distance each, the others grow with its
  logarithm.

  Args:
    distance: i32[...], the position of the key minus that of the query.
    buckets: how many there are, on all sides together.
    longest: distance from which on all share the last bucket of their side.
    sides: one of `SIDES`; with "past" a key that comes later counts as near.

  Returns:
    i32[...], 0 .. buckets - 1.
  """
  begin = 0
  if sides == "both":
    buckets //= 2
    begin = np.where(distance > 0, buckets, 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(-distance, 0)
  exact = buckets // 2
  # In float32, as in the reference: its rounding decides at the borders. At
  # least 1, to keep the logarithm finite where it is not used.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
  growth = np.log(ratio) / np.float32(math.log(longest / exact))
  far = exact + (growth * np.float32(buckets - exact)).astype(np.int32)
  far = np.minimum(far, buckets - 1)
  return (begin + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativePositions(nn.Module):
  """A learned number for every head and bucket of distances (T5).

  Attributes:
    heads: H.
    buckets: see `bucket`.
    longest: likewise.
    sides: likewise.
    table_init: of the numbers.
  """

  heads: int
  buckets: int
  longest: int
  sides: str
  table_init: Initializer

  @nn.compact
  def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
    """The bias f32[B or 1, H, Q, K] for `attention.dot_product_attention`.

    Args:
      query: i32[B or 1, Q], positions.
      key: i32[B or 1, K], positions.

    Raises:
      ValueError: for other sides, or fewer buckets than a side needs.
    """
    config.pick(dict.fromkeys(SIDES), self.sides, "sides")
    least = 4 if self.sides == "both" else 2
    if self.buckets < least or self.longest <= self.buckets // least:
      raise ValueError(
          f"relative positions: {self.buckets} buckets up to a distance of "
          f"{self.longest}; expected at least {least} buckets, and a distance "
          f"above {self.buckets // least}"
      )
    table = param(
        self,
        "table",
        declared(self.table_init, None, "heads"),
        (self.buckets, self.heads),
        jnp.float32,
    )
    reach = np.arange(-self.longest, self.longest + 1)
    by_distance = table[
        bucket(reach, self.buckets, self.longest, self.sides)
    ]
    distance = key[:, None, :] - query[:, :, None]
    index = jnp.clip(distance, -self.longest, self.longest) + self.longest
    return jnp.moveaxis(jnp.take(by_distance, index, axis=0), -1, 1)
