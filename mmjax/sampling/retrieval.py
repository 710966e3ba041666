"""Which of many vectors are nearest to a query? Exact search, on all devices.

The vectors are split over the mesh. Every device multiplies the queries with
its own and keeps the best; the best of the best are the answer, so that only
k scores of each device travel.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mmjax import sharding

_AXES = sharding.RULES["batch"]


class Index:
  """Vectors that queries are compared with by their products.

  Attributes:
    count: how many vectors there are, M.
    width: of each, E.
  """

  def __init__(self, vectors: Any, mesh: Mesh | None = None) -> None:
    """Puts the vectors on the devices.

    Args:
      vectors: f32[M, E]; of unit length, if cosines are wanted.
      mesh: over whose `data` and `fsdp` axes they are split; the ambient mesh
        by default, or one of all devices.

    Raises:
      ValueError: if there is none, or they are no matrix.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not vectors.size:
      raise ValueError(
          f"an index needs vectors [M, E], found {list(vectors.shape)}"
      )
    self.count, self.width = vectors.shape
    if mesh is None:
      mesh = jax.sharding.get_mesh()
    self._mesh = sharding.make_mesh() if mesh.empty else mesh
    parts = sharding.batch_parts(self._mesh)
    padded = np.pad(vectors, ((0, -self.count % parts), (0, 0)))
    self._vectors = jax.device_put(
        padded, NamedSharding(self._mesh, PartitionSpec(_AXES))
    )

  def search(
      self, queries: Any, k: int = 1, exclude: Any = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """The k best vectors of each query, best first.

    Args:
      queries: f32[B, E].
      k: how many; of equal ones the first are taken.
      exclude: i32[B, S], vectors that a query must not find; -1 for none.

    Returns:
      Products f32[B, k] and indices i32[B, k].

    Raises:
      ValueError: for queries of another width, or more answers than there may
        be.
    """
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != self.width:
      raise ValueError(
          f"queries must be [B, {self.width}], found {list(queries.shape)}"
      )
    if exclude is None:
      exclude = np.zeros((len(queries), 0))
    exclude = np.asarray(exclude, np.int32)
    left = self.count - exclude.shape[1]
    if not 1 <= k <= left:
      raise ValueError(
          f"k={k}: there are {self.count} vectors, of which "
          f"{exclude.shape[1]} may be excluded"
      )
    found = _search(
        self._vectors, queries, exclude, self.count, k, self._mesh
    )
    return jax.device_get(found)


@functools.partial(jax.jit, static_argnames=("count", "k", "mesh"))
def _search(
    vectors: jax.Array,
    queries: jax.Array,
    exclude: jax.Array,
    count: int,
    k: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
  """Scores f32[B, k] and indices i32[B, k] of vectors f32[M', E], M' >= M."""
  rows = vectors.shape[0] // sharding.batch_parts(mesh)

  def best(own: jax.Array) -> tuple[jax.Array, jax.Array]:
    first = lax.axis_index(_AXES) * rows
    scores = jnp.matmul(
        queries, own.T, precision="highest", preferred_element_type=jnp.float32
    )
    place = first + jnp.arange(rows)
    gone = (place[:, None] == exclude[:, None, :]).any(axis=-1)
    scores = jnp.where(gone | (place >= count), -jnp.inf, scores)
    top, at = lax.top_k(scores, min(k, rows))
    # Of equal scores `top_k` takes the first: devices must stand in order.
    gather = functools.partial(
        lax.all_gather, axis_name=_AXES, axis=1, tiled=True
    )
    top, at = gather(top), gather(at + first)
    top, chosen = lax.top_k(top, k)
    return top, jnp.take_along_axis(at, chosen, axis=1).astype(jnp.int32)

  whole = PartitionSpec()
  return jax.shard_map(
      best,
      mesh=mesh,
      in_specs=PartitionSpec(_AXES),
      out_specs=(whole, whole),
      check_vma=False,
  )(vectors)
