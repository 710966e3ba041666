"""How do the rows of a mixture become global batches on the devices?"""

import collections
import time
from typing import Any

import jax
import numpy as np

from mmjax import sharding
from mmjax.data import mixture
from mmjax.train.plan import Abstract, Plan


def process_share(mesh: Any, rows: int) -> tuple[int, int]:
  """Which share of a batch's rows this process must load.

  Processes whose devices hold the same rows (a `tensor` axis across them) load
  the same share.

  Returns:
    (index, count) of the share.

  Raises:
    ValueError: if some processes share a part of their rows only.
  """
  held: dict[int, set[int]] = collections.defaultdict(set)
  places = sharding.batch_sharding(mesh).devices_indices_map((rows,))
  for device, (part,) in places.items():
    held[device.process_index] |= set(range(*part.indices(rows)))
  shares = sorted({tuple(sorted(found)) for found in held.values()})
  if sum(map(len, shares)) != rows or len({*map(len, shares)}) != 1:
    raise ValueError(
        f"mesh {dict(mesh.shape)}: the processes hold overlapping or unequal "
        f"parts of the batch; order the axes so that data x fsdp divides, or "
        "is divided by, the number of processes"
    )
  own = tuple(sorted(held[jax.process_index()]))
  return shares.index(own), len(shares)


def make_iterator(plan: Plan, threads: int, workers: int = 0) -> Any:
  """This process's rows of a plan's batches; see `mixture.batches`."""
  index, count = process_share(plan.mesh, plan.stage.batch_size)
  return mixture.batches(
      plan.streams,
      batch_size=plan.stage.batch_size,
      seed=plan.stage.seed,
      process_index=index,
      process_count=count,
      threads=threads,
      workers=workers,
  )


class Feed:
  """Global batches on the devices, one ahead of the step that reads them."""

  def __init__(self, iterator: Any, batch: Abstract) -> None:
    """Wraps an iterator over this process's rows, which can be saved."""
    self._iterator = iterator
    self._batch = batch
    self._ahead: tuple[dict[str, jax.Array], Any] | None = None

  def load(self) -> float:
    """Loads the next batch; returns the seconds that it took."""
    begin = time.perf_counter()
    rows = next(self._iterator)
    arrays = {
        key: jax.make_array_from_process_local_data(
            leaf.sharding, np.asarray(rows[key], leaf.dtype), leaf.shape
        )
        for key, leaf in self._batch.items()
    }
    # A copy: the iterator may go on to change what it returned.
    self._ahead = arrays, dict(self._iterator.get_state())
    return time.perf_counter() - begin

  def take(self) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """The loaded batch, and the iterator's state behind it."""
    taken, self._ahead = self._ahead, None
    return taken

  def close(self) -> None:
    """Ends what prepares batches ahead."""
    self._iterator.close()

  def seek(self, batches: int) -> None:
    """Goes to where so many global batches have been taken."""
    self._iterator.set_state({"next_index": batches})
    self._ahead = None
