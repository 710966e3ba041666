"""How is a TPU kernel of attention laid over the tiles that somebody sees?

The grid of a kernel has one axis for tiles of queries and keys, the list of
those that are not hidden. XLA makes the list from the mask, the kernel
prefetches it, and the length of the axis is data: a hidden tile costs no step,
no copy and no arithmetic.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mmjax.kernels import device, intervals
from mmjax.kernels.intervals import HIDDEN, PARTIAL, WHOLE, Mask

MAX_HEAD_DIM = 256

# Queries and keys in a tile, by kind of device and the largest head size that
# an entry serves. `python -m mmjax.kernels._flash_tpu_tiles` derives the table.
TILES: Mapping[str, Mapping[int, tuple[int, int]]] = {
    "TPU v5 lite": {64: (512, 512), 128: (512, 512), 256: (512, 512)},
    "TPU v5": {64: (512, 512), 128: (512, 512), 256: (512, 512)},
    "TPU v6 lite": {64: (1024, 1024), 128: (1024, 1024), 256: (1024, 1024)},
}

# On other devices, some of which have less vector memory.
_SMALL_TILES = (256, 256)

# The state of the first tile of a row of tiles that nobody sees: there is
# nothing to compute, but zeros to write.
_EMPTY = 3

# One step of a kernel in 32 bits: the state of its tile, whether it begins and
# ends its outer tile, and the numbers of the inner and the outer tile.
_STATE = 3
_BEGINS, _ENDS = 1 << 2, 1 << 3
_INNER, _INNER_BITS = 4, 13
_OUTER, _OUTER_BITS = 17, 14

# Steps that may be prefetched; they take half of the scalar memory.
_MAX_STEPS = 2**17


def tile_sizes(
    device_kind: str, head_dim: int, dtype: Any, queries: int, keys: int
) -> tuple[int, int]:
  """(queries, keys) in a tile, multiples of 128.

  Short sequences get smaller tiles, and any other is cut into equal ones, so
  that less than 128 positions a tile are padding.
  """
  tiles = TILES.get(device_kind, {MAX_HEAD_DIM: _SMALL_TILES})
  rows, columns = tiles[min(dim for dim in tiles if dim >= head_dim)]
  if dtype == jnp.float32:
    rows, columns = halved((rows, columns))

  def cut(length: int, size: int) -> int:
    share = pl.cdiv(length, pl.cdiv(length, size))
    return 128 * pl.cdiv(share, 128)

  return cut(queries, rows), cut(keys, columns)


def halved(tiles: tuple[int, int]) -> tuple[int, int]:
  """Tiles for float32, which takes twice the bytes and six times the passes."""
  return max(128, tiles[0] // 2), max(128, tiles[1] // 2)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a call at trace time.

  Attributes:
    batch: B.
    heads: H.
    groups: G.
    dim: D.
    queries: Q, without padding.
    keys: K, without padding.
    rows: queries in a tile.
    columns: keys in a tile.
    dtype: of q, k and v.
    pattern: of the mask.
    shared: whether one mask serves the whole batch.
    scale: factor on the dot products.
    softcap: see `flash_attention`.
    interpret: whether to run without a TPU.
  """

  batch: int
  heads: int
  groups: int
  dim: int
  queries: int
  keys: int
  rows: int
  columns: int
  dtype: Any
  pattern: str
  shared: bool
  scale: float
  softcap: float | None
  interpret: bool

  @property
  def repeats(self) -> int:
    """Query heads that share a head of keys."""
    return self.heads // self.groups

  @property
  def padded(self) -> tuple[int, int]:
    """Queries and keys after padding to whole tiles."""
    up = lambda length, size: pl.cdiv(length, size) * size
    return up(self.queries, self.rows), up(self.keys, self.columns)


def make_plan(
    q: jax.Array,
    k: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float | None,
    interpret: bool,
    tiles: tuple[int, int] | None,
) -> Plan:
  """The plan of a call; see `Plan`. `tiles` overrides `tile_sizes`."""
  batch, queries, heads, dim = q.shape
  keys, groups = k.shape[1:3]
  rows, columns = tiles or tile_sizes(
      device.kind(), dim, q.dtype, queries, keys
  )
  shapes = mask.block.shape, mask.first.shape, mask.last.shape
  return Plan(
      batch, heads, groups, dim, queries, keys, rows, columns, q.dtype,
      mask.pattern, all(shape[0] == 1 for shape in shapes),
      scale, softcap, interpret,
  )


# Which tiles are visited, and in which order.


def pack_steps(states: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The tiles that somebody sees, the outer ones in order.

  Args:
    states: i32[B or 1, M, N] of `intervals.tile_states`, outer tiles first.

  Returns:
    i32[(B or 1) * M * N], the steps of each row of the batch, packed as said
    at `_STATE`; those behind the last one do nothing and copy nothing. And
    i32[], how many the longest row has.

  Raises:
    ValueError: if there are more tiles than can be numbered or prefetched.
  """
  batch, outers, inners = states.shape
  if batch * outers * inners > _MAX_STEPS:
    # One list for the whole batch: no row visits less than any other.
    whole, hidden = (
        (states == state).all(0, keepdims=True) for state in (WHOLE, HIDDEN)
    )
    states = jnp.where(whole, WHOLE, jnp.where(hidden, HIDDEN, PARTIAL))
    batch = 1
  size = outers * inners
  if size > _MAX_STEPS or outers >> _OUTER_BITS or inners >> _INNER_BITS:
    raise ValueError(
        f"attention: {outers} x {inners} tiles; the TPU kernels take at most "
        f"{_MAX_STEPS} in all, {1 << _OUTER_BITS} outer and "
        f"{1 << _INNER_BITS} inner ones: shard the sequence over the mesh"
    )
  empty = (states == HIDDEN).all(-1)
  states = states.at[:, :, 0].set(jnp.where(empty, _EMPTY, states[:, :, 0]))
  states = states.reshape(batch, size)
  order, count = intervals.schedule(states)
  step, end = jnp.arange(size), count[:, None] - 1
  state = jnp.take_along_axis(states, order, axis=1)
  state = jnp.where((step > end) | (state == _EMPTY), HIDDEN, state)
  outer, inner = order // inners, order % inners
  changes = outer[:, 1:] != outer[:, :-1]
  edge = jnp.ones((batch, 1), bool)
  begins = jnp.concatenate([edge, changes], axis=1)
  ends = jnp.concatenate([changes, edge], axis=1) | (step == end)
  ends &= step <= end
  packed = (
      state | begins * _BEGINS | ends * _ENDS
      | inner << _INNER | outer << _OUTER
  )
  return packed.reshape(-1), count.max()


@dataclasses.dataclass(frozen=True)
class Grid:
  """The grid (batch, heads, steps, repeats) and where a step finds its tiles.

  Queries first: `heads` runs over query heads and `repeats` is 1. Keys first:
  `heads` runs over heads of keys and `repeats` over the query heads of one.

  Attributes:
    plan: of the call.
    keys_first: whether the outer tile is one of keys.
    size: how many numbers the list of steps has for a row of the batch.
    one_list: whether one list serves the whole batch.
  """

  plan: Plan
  keys_first: bool
  size: int
  one_list: bool

  def step(self, steps: Any, at: Sequence[Any]) -> Any:
    """The packed step of a place in the grid."""
    return steps[at[2] if self.one_list else at[0] * self.size + at[2]]

  def tiles(self, step: Any) -> tuple[Any, Any]:
    """The numbers of the tile of queries and the tile of keys."""
    outer = step >> _OUTER
    inner = (step >> _INNER) & ((1 << _INNER_BITS) - 1)
    return (inner, outer) if self.keys_first else (outer, inner)

  def _spec(
      self,
      shape: tuple[int | None, ...],
      index: Callable[[Sequence[Any], Any, Any, Any], tuple[Any, ...]],
  ) -> pl.BlockSpec:
    def index_map(*args: Any) -> tuple[Any, ...]:
      *at, steps = args
      step = self.step(steps, at)
      return index(at, *self.tiles(step), step)

    return pl.BlockSpec(shape, index_map)

  def _head(self, at: Sequence[Any], step: Any) -> Any:
    if not self.keys_first:
      return at[1]
    # Steps with nothing to compute stay where they are: no head is copied.
    last = self.plan.repeats - 1
    repeat = jnp.where((step & _STATE) == HIDDEN, last, at[3])
    return at[1] * self.plan.repeats + repeat

  def of_queries(self, height: int) -> pl.BlockSpec:
    """A tile of [B, H, height, Q]."""
    return self._spec(
        (None, None, height, self.plan.rows),
        lambda at, i, j, step: (at[0], self._head(at, step), 0, i),
    )

  def of_keys(self) -> pl.BlockSpec:
    """A tile of [B, G, D, K]."""
    plan = self.plan
    group = lambda at: (
        at[1] if self.keys_first else lax.div(at[1], jnp.int32(plan.repeats))
    )
    return self._spec(
        (None, None, plan.dim, plan.columns),
        lambda at, i, j, _: (at[0], group(at), 0, j),
    )

  def of_mask(self) -> list[pl.BlockSpec]:
    """Tiles of [B or 1, 1, Q] and [B or 1, 2, K]; see `mask_operands`."""
    plan = self.plan
    row = lambda at: 0 if plan.shared else at[0]
    if plan.pattern != "interval":
      return []
    return [
        self._spec(
            (None, 1, plan.rows), lambda at, i, j, _: (row(at), 0, i)
        ),
        self._spec(
            (None, 2, plan.columns), lambda at, i, j, _: (row(at), 0, j)
        ),
    ]


def mask_operands(plan: Plan, mask: Mask) -> list[jax.Array]:
  """Blocks and bounds of a padded mask; none where a pattern says it all."""
  if plan.pattern != "interval":
    return []
  batch = 1 if plan.shared else plan.batch
  block, first, last = (
      jnp.broadcast_to(x, (batch, x.shape[1]))
      for x in (mask.block, mask.first, mask.last)
  )
  return [block[:, None], jnp.stack([first, last], axis=1)]


class Step(NamedTuple):
  """What a kernel knows of where it is.

  Attributes:
    state: of the tile; hidden where there is nothing to compute.
    begins: whether the outer tile is entered.
    ends: whether it is left.
    i: number of the tile of queries.
    j: number of the tile of keys.
  """

  state: jax.Array
  begins: jax.Array
  ends: jax.Array
  i: jax.Array
  j: jax.Array


def run(
    plan: Plan,
    kernel: Callable[..., None],
    states: jax.Array,
    operands: Sequence[jax.Array],
    in_specs: Callable[[Grid], list[pl.BlockSpec]],
    out_specs: Callable[[Grid], list[pl.BlockSpec]],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]],
    *,
    keys_first: bool = False,
    products: int,
) -> list[jax.Array]:
  """Calls a kernel on every tile that somebody sees.

  Args:
    plan: of the call.
    kernel: takes the plan, a `Step`, and a reference to a tile of each operand,
      result and accumulator.
    states: of the tiles, [B or 1, M, N].
    operands: arrays of the call.
    in_specs: their tiles.
    out_specs: tiles of the results.
    out_shape: the results.
    scratch: shapes of float32 accumulators.
    keys_first: whether the outer tiles are those of keys.
    products: matrix products in a tile, for the estimate of the cost.

  Raises:
    ValueError: see `pack_steps`.
  """
  if keys_first:
    states = states.swapaxes(1, 2)
  size = states.shape[1] * states.shape[2]
  steps, count = pack_steps(states)
  grid = Grid(plan, keys_first, size, one_list=steps.shape[0] == size)
  heads, repeats = (
      (plan.groups, plan.repeats) if keys_first else (plan.heads, 1)
  )

  def body(steps: Any, *refs: Any) -> None:
    at = [pl.program_id(axis) for axis in range(4)]
    packed = grid.step(steps, at)
    step = Step(
        packed & _STATE,
        ((packed & _BEGINS) != 0) & (at[3] == 0),
        ((packed & _ENDS) != 0) & (at[3] == repeats - 1),
        *grid.tiles(packed),
    )
    kernel(plan, step, *refs)

  return pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(plan.batch, heads, count, repeats),
          in_specs=in_specs(grid),
          out_specs=out_specs(grid),
          scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=out_shape,
      # The tiles are chosen to fit the vector memory that a kernel gets anyway.
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", *["arbitrary"] * 2),
      ),
      cost_estimate=_cost(
          plan, keys_first, products, [*operands, *out_shape]
      ),
      interpret=plan.interpret,
  )(steps, *operands)


def _cost(
    plan: Plan, keys_first: bool, products: int, arrays: Sequence[Any]
) -> pl.CostEstimate:
  """At most what a call costs.

  Which tiles of an interval mask are visible is data: all are counted. Of a
  causal one those at and below the diagonal are.
  """
  rows, columns = plan.padded
  scores = rows * columns
  if plan.pattern == "causal":
    scores = sum(
        plan.rows * min(columns, plan.columns * pl.cdiv(end, plan.columns))
        for end in range(plan.rows, rows + 1, plan.rows)
    )
  scores *= plan.batch * plan.heads
  nbytes = lambda x: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
  # Two arrays of inner tiles, which every outer tile reads again.
  outer = plan.columns if keys_first else plan.rows
  again = 2 * scores // outer * plan.dim * jnp.dtype(plan.dtype).itemsize
  return pl.CostEstimate(
      flops=2 * products * plan.dim * scores,
      transcendentals=scores * (1 if plan.softcap is None else 2),
      bytes_accessed=sum(map(nbytes, arrays)) + again,
  )
