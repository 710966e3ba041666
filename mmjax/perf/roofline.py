"""How fast can a step be? Bounds from FLOPs, bytes, links and a chip's figures.

The model is deliberately simple; it gives two bounds, not one wrong number:

  * compute: matrix FLOPs at the peak rate of their operands' dtype, everything
    else free;
  * memory: what the compiled program's instructions read and write in HBM
    (`hlo.Program.traffic`), at full bandwidth;
  * collectives: the bytes that the best ring algorithm sends over each link, at
    full bandwidth, without latency and without sharing links with another
    collective. A torus dimension that closes into a ring sends both ways round;
    one that does not is a line, whose end links carry everything one way. A
    group that spans several dimensions uses the links of all of them.

If all of these overlap perfectly a step takes as long as the longest one
(`best`); if nothing overlaps, their sum (`worst`). A real step is rarely faster
than the first; it can be slower than the second, for the reasons above.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax

from mmjax.perf import hlo
from mmjax.perf.topology import Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one step on one device, by resource.

  Attributes:
    compute: matrix units.
    memory: HBM.
    ici: links inside a slice.
    dcn: network between slices.
    useful: the part of `compute` that is no rematerialisation.
  """

  compute: float
  memory: float
  ici: float
  dcn: float
  useful: float

  @property
  def bound(self) -> str:
    """The resource that limits the step."""
    names = ("compute", "memory", "ici", "dcn")
    return max(names, key=lambda name: getattr(self, name))

  @property
  def best(self) -> float:
    """Seconds of a step in which everything overlaps."""
    return max(self.compute, self.memory, self.ici, self.dcn)

  @property
  def worst(self) -> float:
    """Seconds of a step in which nothing overlaps."""
    return self.compute + self.memory + self.ici + self.dcn

  def mfu(self, seconds: float) -> float:
    """Model FLOP utilisation of a step that takes `seconds`."""
    return self.useful / seconds


def estimate(
    flops: Mapping[str, float],
    rematerialised: float,
    hbm_bytes: float,
    collectives: Sequence[hlo.Collective],
    topology: Topology,
    mesh: jax.sharding.Mesh,
) -> Estimate:
  """Bounds the time of one step on one device.

  Args:
    flops: matrix FLOPs per device by operand dtype.
    rematerialised: the fraction of them that is computed a second time.
    hbm_bytes: bytes read from and written to HBM per device.
    collectives: those of the program, per device.
    topology: the slices it runs on.
    mesh: the mesh it was compiled for, over devices of that topology.
  """
  chip = topology.chip
  compute = sum(n / chip.peak(dtype) for dtype, n in flops.items())
  seconds = {"ici": 0.0, "dcn": 0.0}
  for collective in collectives:
    seconds[collective.network] += collective_seconds(
        collective, topology, mesh
    )
  return Estimate(
      compute=compute,
      memory=hbm_bytes / chip.hbm_bandwidth,
      useful=compute * (1 - rematerialised),
      **seconds,
  )


def collective_seconds(
    collective: hlo.Collective, topology: Topology, mesh: jax.sharding.Mesh
) -> float:
  """Seconds that all executions of a collective keep the links busy."""
  n = len(collective.group)
  if n < 2:
    return 0.0
  torus = topology.chip.torus
  if collective.network == "dcn":
    # The data centre network is switched: no hops in between.
    lines = [(n, torus.dcn_bandwidth)]
    exchange = (n - 1) / n / torus.dcn_bandwidth
  else:
    lines = _lines(collective.group, topology, mesh)
    # Half of what a line holds crosses its middle, half of that each way.
    exchange = max(extent / 4 / bandwidth for extent, bandwidth in lines)
  total = sum(bandwidth for _, bandwidth in lines)
  seconds_per_byte = {
      "all-reduce": 2 * (n - 1) / n / total,
      "all-gather": (n - 1) / n / total,
      "reduce-scatter": (n - 1) / n / total,
      "all-to-all": exchange,
      "ragged-all-to-all": exchange,
      "collective-broadcast": 1 / total,
  }.get(collective.op, 1 / min(bandwidth for _, bandwidth in lines))
  return collective.bytes * seconds_per_byte


def _lines(
    group: Sequence[int], topology: Topology, mesh: jax.sharding.Mesh
) -> list[tuple[int, float]]:
  """(extent, bytes/s) of each torus dimension that a group spans."""
  devices = mesh.devices.flatten()
  places = [tuple(devices[i].coords) for i in group]
  link = topology.chip.torus.link_bandwidth
  lines = []
  for dim, (size, closed) in enumerate(zip(topology.shape, topology.wraps)):
    extent = len({place[dim] for place in places})
    if extent > 1:
      # Two neighbours on a ring of two share one link, as on a line.
      both_ways = closed and extent == size and size > 2
      lines.append((extent, link * (2 if both_ways else 1)))
  # The cores of one chip are joined by more than a link; how much is not
  # published as a figure, so a link it is.
  return lines or [(len(group), link)]
