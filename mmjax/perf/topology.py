"""What does a TPU slice that nobody owns look like to the compiler?

libtpu describes the devices of a named slice, and XLA compiles for them, on a
machine without a TPU. That works inside an ordinary CPU process, before or
after its first computation, and leaves the CPU backend as it is. libtpu looks
for a TPU machine around it once, when it is loaded; the environment that
`devices` sets answers its questions, so that it neither waits nor complains.
JAX loads libtpu early, and unanswered, if it may search for an accelerator:
start the process with `JAX_PLATFORMS=cpu`, or call `devices` before the first
computation, to keep its complaints off the terminal.
"""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
from importlib.util import find_spec
import math
import os
import re
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
import numpy as np

from mmjax.perf import chips

# What a TPU machine would tell libtpu about itself; the answers describe one
# that has nothing to do with the topology asked for, and are not used for it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    # Several processes of one machine may compile at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Slices smaller than, or other than, a multiple of the 4x4x4 cube.
_SMALL = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """One or more equal TPU slices.

  Attributes:
    chip: the chip they are made of.
    shape: chips per dimension of one slice, `(4, 4)`.
    slices: how many slices, connected by the data centre network.
  """

  chip: chips.Chip
  shape: tuple[int, ...]
  slices: int = 1

  def __str__(self) -> str:
    name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
    return name if self.slices == 1 else f"{name}*{self.slices}"

  @property
  def num_devices(self) -> int:
    """JAX devices of all slices."""
    return math.prod(self.shape) * self.slices * self.chip.devices_per_chip

  @property
  def wraps(self) -> tuple[bool, ...]:
    """Per dimension: do its links close into a ring?

    A 2-D torus closes a dimension that spans the pod; a 3-D one is built of
    cubes, and closes all dimensions or none.
    """
    closed = tuple(n % self.chip.torus.wrap == 0 for n in self.shape)
    return closed if self.chip.torus.dims == 2 else (all(closed),) * 3


def parse(name: str) -> Topology:
  """Reads `CHIP:SHAPE` or `CHIP:SHAPE*SLICES`: `v5e:4x4`, `v5p:4x4x4*2`.

  Raises:
    ValueError: if the form, the chip or the shape is unknown; lists the known.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
  if not match:
    raise ValueError(
        f"topology {name!r}: expected CHIP:SHAPE or CHIP:SHAPE*SLICES, as "
        "v5e:4x4, v5p:4x4x4 or v5e:4x4*2"
    )
  chip_name, shape, slices = match.groups()
  known = [c.name for c in chips.CHIPS.values() if c.torus]
  if chip_name not in known:
    raise ValueError(
        f"topology {name!r}: unknown chip {chip_name!r}; known: "
        f"{', '.join(known)}"
    )
  topology = Topology(
      chip=chips.CHIPS[chip_name],
      shape=tuple(map(int, shape.split("x"))),
      slices=int(slices or 1),
  )
  _check(name, topology)
  return topology


def _check(name: str, topology: Topology) -> None:
  torus, shape = topology.chip.torus, topology.shape
  cubes = torus.dims == 3 and len(shape) == 3 and (
      all(n and n % 4 == 0 for n in shape)
      and shape == tuple(sorted(shape))
      and math.prod(shape) <= torus.max_chips
  )
  if not cubes and "x".join(map(str, shape)) not in _SMALL[torus.dims]:
    known = ", ".join(_SMALL[torus.dims])
    if torus.dims == 3:
      known += (
          ", and AxBxC of multiples of 4 with A <= B <= C and at most "
          f"{torus.max_chips} chips, as 4x4x4 or 4x4x8"
      )
    raise ValueError(
        f"topology {name!r}: {topology.chip.name} has no slice of shape "
        f"{'x'.join(map(str, shape))}; known: {known}"
    )
  if topology.slices < 1:
    raise ValueError(f"topology {name!r}: expected at least one slice")


def libtpu_requirement() -> str:
  """The libtpu that the installed JAX asks for, such as `libtpu==0.0.42.*`."""
  for requirement in importlib.metadata.requires("jax") or ():
    name, _, marker = requirement.partition(";")
    if name.startswith("libtpu") and "tpu" in marker:
      return name.strip()
  return "libtpu"


def devices(topology: Topology | str) -> Sequence[jax.Device]:
  """The devices of a topology, to compile for; nothing can run on them.

  Raises:
    ValueError: for a name that `parse` refuses.
    RuntimeError: if libtpu is not installed; says how to install it.
  """
  if isinstance(topology, str):
    topology = parse(topology)
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  if find_spec("libtpu") is None:
    raise RuntimeError(
        "compiling for a TPU without one needs libtpu, which is not "
        f'installed; run: pip install "{libtpu_requirement()}"'
    )
  options: dict[str, Any] = {}
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  if topology.chip.name == "v4":
    # Otherwise libtpu shows the two cores of a chip as two devices.
    options["chip_config_name"] = "megacore"
  shape = topology.shape
  if math.prod(shape) == 1:
    # libtpu counts four chips to a host unless told otherwise.
    options["chips_per_host_bounds"] = (1, 1, 1)
  name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
  return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
  ).devices


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices as an array of shape `sizes` whose axes follow the links.

  Slices are spread along the first axes that they divide, so give the axis
  with the least traffic first; within a slice neighbours on an axis are
  neighbours on the torus as far as the sizes allow it.

  Args:
    sizes: sizes of the mesh axes; their product is the number of devices.
    devices: all devices of equal slices.
  """
  left = len({getattr(device, "slice_index", 0) for device in devices})
  if left == 1:
    return mesh_utils.create_device_mesh(
        sizes, list(devices), allow_split_physical_axes=True
    )
  outer = []
  for size in sizes:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  return mesh_utils.create_hybrid_device_mesh(
      [size // parts for size, parts in zip(sizes, outer)],
      outer,
      list(devices),
      allow_split_physical_axes=True,
  )
