"""Which tiles should the TPU kernels of attention use? Derives `TILES`.

  JAX_PLATFORMS=cpu python -m mmjax.kernels._flash_tpu_tiles

No TPU is needed, but libtpu: for every chip and head size the candidates are
ordered by an explicit model of the time of a forward and backward pass, and the
first of which all kernels compile within the vector memory that the compiler
grants them is taken. Large tiles spread the price of a step, small ones follow
a mask more closely: the model weighs a causal mask and a window alike. Of a
step of a kernel it knows

  matrix unit   2 FLOP a score, product and channel (head sizes fill 128)
  vector unit   operations a score, as the compiler's schedules have them
  HBM           the inner tiles, which are read again for every outer one

at the published rates: the slowest of the three, and a fixed price of a step.
"""

import dataclasses
import functools
import itertools
import math
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from mmjax.kernels import _flash_tpu as flash
from mmjax.kernels import _flash_tpu_grid as grids
from mmjax.kernels import intervals
from mmjax.kernels.intervals import Mask

HEAD_DIMS = 64, 128, 256
SIZES = 256, 512, 1024

# The masks of the model: a query sees so many keys up to its own.
POSITIONS = 4096
WINDOWS = 4096, 512

# Matrix products, and vector operations for a score, in each kernel.
KERNELS = {"forward": (2, 7.0), "dq": (3, 7.0), "dkv": (4, 8.5)}

# Seconds that a step of a kernel takes besides its work: the price that the
# documentation of Pallas gives for a step of a grid.
STEP = 0.35e-6

# What a TPU machine would tell libtpu about itself.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Core:
  """One TensorCore, which runs a kernel; v5p has two of them in a device.

  Attributes:
    topology: a slice of such chips, to compile for.
    flops: bfloat16 FLOP/s of the matrix units.
    hbm: bytes/s.
    clock: cycles/s; four vector operations of 1024 lanes start in each.
  """

  topology: str
  flops: float
  hbm: float
  clock: float


CORES = {
    "TPU v5 lite": Core("v5e:2x2", 197e12, 819e9, 1.5e9),
    "TPU v5": Core("v5p:2x2x1", 459e12 / 2, 2765e9 / 2, 1.75e9),
    "TPU v6 lite": Core("v6e:2x2", 918e12, 1638e9, 1.75e9),
}


def visible(rows: int, columns: int, window: int) -> int:
  """Tiles in which a query sees one of the last `window` keys."""
  i = np.arange(0, POSITIONS, rows)[:, None]
  j = np.arange(0, POSITIONS, columns)
  return int(((j < i + rows) & (j + columns > i - window + 1)).sum())


def _step(
    core: Core, name: str, dim: int, rows: int, columns: int
) -> tuple[float, int]:
  """Seconds of a step of a kernel in bfloat16, and bytes of its inner tiles."""
  products, operations = KERNELS[name]
  channels = 128 * -(-dim // 128)
  scores = rows * columns
  # Two inner tiles: keys and values, or queries and cotangents.
  inner = 2 * 2 * dim * (rows if name == "dkv" else columns)
  return STEP + max(
      2 * products * scores * channels / core.flops,
      operations * scores / (4 * 1024 * core.clock),
      inner / core.hbm,
  ), inner


def seconds(
    core: Core, dim: int, rows: int, columns: int, window: int
) -> float:
  """The model: a head of a forward and backward pass in bfloat16."""
  steps = sum(_step(core, name, dim, rows, columns)[0] for name in KERNELS)
  return steps * visible(rows, columns, window)


class Paper(NamedTuple):
  """What the kernels cost on paper: a forward and a backward pass, bfloat16.

  Attributes:
    visited: tiles of a head that are visited, in each kernel.
    tiles: all tiles of a head.
    nbytes: HBM traffic of all heads: inner tiles at each step, outer ones once.
    vmem: bytes of the buffers of the largest kernel, dk/dv.
    seconds: of all heads, by the model.
    share: of the peak, of the products of visible pairs in a fused backward
      pass (seven of them; the kernels compute nine).
  """

  visited: int
  tiles: int
  nbytes: int
  vmem: int
  seconds: float
  share: float


def on_paper(kind: str, mask: Mask, heads: int, dim: int) -> Paper:
  """The cost of self-attention of `heads` heads on a chip, batch 1."""
  core, length = CORES[kind], mask.shape[0]
  rows, columns = grids.tile_sizes(kind, dim, jnp.bfloat16, length, length)
  up = lambda size: -(-length // size) * size
  padded = intervals.pad(mask, up(rows), up(columns))
  states = intervals.tile_states(padded, rows, columns)[0]
  visited = int((states != intervals.HIDDEN).sum())
  costs = [_step(core, name, dim, rows, columns) for name in KERNELS]
  total = heads * visited * sum(cost for cost, _ in costs)
  # Forward: q in, o out; dq: q, do in, dq out; dk/dv: k, v in, dk, dv out.
  outer = 2 * dim * (5 * up(rows) + 4 * up(columns))
  nbytes = heads * (visited * sum(inner for _, inner in costs) + outer)
  # Every operand and result twice; two accumulators and three tiles of scores
  # in float32.
  vmem = 2 * 2 * dim * (2 * rows + 4 * columns)
  vmem += 4 * (2 * dim * columns + 3 * rows * columns)
  useful = 2 * 7 * dim * heads * int(intervals.visible_pairs(mask)[0])
  return Paper(
      visited, states.size, nbytes, vmem, total, useful / core.flops / total
  )


def candidates(core: Core, dim: int) -> list[tuple[int, int]]:
  """Tiles from the fastest to the slowest by the model."""
  mean = lambda tiles: math.prod(
      seconds(core, dim, *tiles, window) for window in WINDOWS
  )
  return sorted(itertools.product(SIZES, SIZES), key=mean)


def device(core: Core) -> jax.Device:
  """A device of the chip, to compile for; needs libtpu."""
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  return topologies.get_topology_desc(
      platform="tpu", topology_name=core.topology
  ).devices[0]


def fits(
    target: jax.Device, dim: int, dtype: str, tiles: tuple[int, int]
) -> bool:
  """Whether all three kernels compile within the vector memory of a kernel."""
  place = jax.sharding.SingleDeviceSharding(target)
  array = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=place)
  # Arrays too large for vector memory, where the compiler may put small ones.
  q = array((1, 1 << 16, 8, dim), dtype)
  row = array((1, 8, 1 << 16), jnp.float32)
  place_of = array((1, 1 << 16), jnp.int32)
  options = dict(scale=1.0, softcap=1.0, interpret=False, tiles=tiles)
  forward = functools.partial(flash.forward, **options)
  backward = functools.partial(flash.backward, **options)
  mesh = jax.sharding.Mesh(
      np.array([target]), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  mask = Mask(place_of, place_of, place_of)
  with jax.set_mesh(mesh):
    try:
      jax.jit(forward).lower(q, q, q, mask).compile()
      jax.jit(backward).lower(q, q, q, mask, row, row, q).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return False
  return True


def derive(kind: str, dim: int) -> tuple[int, int]:
  """The entry of `TILES` for a kind of device and a head size.

  Raises:
    ValueError: if none of the candidates fits.
  """
  core = CORES[kind]
  target = device(core)
  for tiles in candidates(core, dim):
    single = grids.halved(tiles)
    if fits(target, dim, "bfloat16", tiles) and fits(
        target, dim, "float32", single
    ):
      return tiles
  raise ValueError(f"{kind}, head size {dim}: no tiles of {SIZES} fit")


def main() -> None:
  """Prints the table, and what the model says of its entries."""
  for kind, core in CORES.items():
    table = {dim: derive(kind, dim) for dim in HEAD_DIMS}
    print(f'    "{kind}": {table},')
    for dim, tiles in table.items():
      products = sum(count for count, _ in KERNELS.values())
      least = products * dim * POSITIONS**2 / core.flops
      share = least / seconds(core, dim, *tiles, POSITIONS)
      print(f"    # head size {dim}: causal at {share:.0%} of the peak")


if __name__ == "__main__":
  main()
