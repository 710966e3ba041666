"""How is a function mapped over a data set on every device?"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mmjax import sharding
from mmjax.data import mixture


def map_source(
    function: Callable[..., Mapping[str, jax.Array]],
    variables: Any,
    source: Any,
    batch_size: int,
) -> dict[str, np.ndarray]:
  """Applies a function to all examples of a source, once and in order.

  Args:
    function: `(variables, batch) -> {name: [B, ...]}`; it is jitted here.
    variables: its first argument.
    source: a random-access source of examples.
    batch_size: global batch; rounded up so that the mesh divides it.

  Returns:
    The results, and the batch's `label` and `identity` where it has them, as
    host arrays of `len(source)` rows on every process.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    mesh = sharding.make_mesh()
  parts = int(np.lcm(sharding.batch_parts(mesh), jax.process_count()))
  batch_size = -(-batch_size // parts) * parts
  place = sharding.batch_sharding(mesh)
  function = jax.jit(function)
  rows: list[dict[str, np.ndarray]] = []
  for batch in _local_batches(source, batch_size):
    batch = {
        name: jax.make_array_from_process_local_data(place, leaf)
        for name, leaf in batch.items()
    }
    found = dict(function(variables, batch))
    for key in ("label", "identity", "valid"):
      if key in batch:
        found.setdefault(key, batch[key])
    rows.append(jax.tree.map(_to_host, found))
  columns = {
      name: np.concatenate([row[name] for row in rows]) for name in rows[0]
  }
  valid = columns.pop("valid") > 0
  return {name: column[valid] for name, column in columns.items()}


def _local_batches(
    source: Any, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  return iter(
      mixture.eval_batches(
          source, batch_size, jax.process_index(), jax.process_count()
      )
  )


def _to_host(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)
