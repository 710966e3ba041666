"""The model of time, by hand."""

import importlib.util
import types

import numpy as np
import pytest

from mmjax.perf import hlo, roofline, topology

GB = 10**9


def _mesh(name):
  """A mesh whose devices have coordinates, in row-major order."""
  shape = topology.parse(name).shape
  devices = np.empty(int(np.prod(shape)), object)
  devices[:] = [
      types.SimpleNamespace(coords=(*coords, 0)[:3])
      for coords in np.ndindex(*shape)
  ]
  return types.SimpleNamespace(devices=devices)


def _seconds(name, op, group, nbytes=GB, network="ici"):
  collective = hlo.Collective(op, network, group, count=3, bytes=nbytes)
  return roofline.collective_seconds(
      collective, topology.parse(name), _mesh(name)
  )


# One link of a v5e carries 50 GB/s each way, of a v5p 100 GB/s.
@pytest.mark.parametrize(
    ("name", "op", "group", "expected"),
    [
        # A line of four: its end takes in three quarters over one link.
        ("v5e:4x4", "all-gather", (0, 1, 2, 3), 0.75 / 50),
        ("v5e:4x4", "reduce-scatter", (0, 4, 8, 12), 0.75 / 50),
        ("v5e:4x4", "all-reduce", (0, 1, 2, 3), 2 * 0.75 / 50),
        # All sixteen use the links of both dimensions.
        ("v5e:4x4", "all-gather", tuple(range(16)), 15 / 16 / 100),
        # A closed ring goes round both ways; a part of it does not.
        ("v5p:4x4x4", "all-gather", (0, 1, 2, 3), 0.75 / 200),
        ("v5p:4x4x4", "all-gather", (0, 1), 0.5 / 100),
        ("v5e:16x16", "all-gather", tuple(range(16)), 15 / 16 / 100),
        # A fourth of what the ring holds crosses each of its two cuts.
        ("v5p:4x4x4", "all-to-all", (0, 1, 2, 3), 4 / 4 / 200),
        ("v5e:4x4", "all-to-all", (0, 1, 2, 3), 4 / 4 / 50),
        ("v5e:4x4", "collective-permute", (0, 1, 2, 3), 1 / 50),
        ("v5e:4x4", "all-reduce", (0,), 0),
    ],
)
def test_inside_a_slice(name, op, group, expected):
  assert _seconds(name, op, group) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("all-reduce", 2 * 0.5 / 3.125),
        ("all-gather", 0.5 / 3.125),
        ("all-to-all", 0.5 / 3.125),
        ("collective-permute", 1 / 3.125),
    ],
)
def test_between_slices(op, expected):
  got = _seconds("v5e:4x4*2", op, (1, 2), network="dcn")
  assert got == pytest.approx(expected)


def test_estimate():
  found = roofline.estimate(
      flops={"bfloat16": 197e12 * 0.02, "int8": 393e12 * 0.01},
      rematerialised=0.25,
      hbm_bytes=819e9 * 0.005,
      collectives=[
          hlo.Collective("all-gather", "ici", (0, 1, 2, 3), 1, GB),
          hlo.Collective("all-reduce", "dcn", (1, 2), 1, GB // 100),
      ],
      topology=topology.parse("v5e:4x4*2"),
      mesh=_mesh("v5e:4x4"),
  )
  assert found.compute == pytest.approx(0.03)
  assert found.memory == pytest.approx(0.005)
  assert found.ici == pytest.approx(0.015)
  assert found.dcn == pytest.approx(0.0032)
  assert found.bound == "compute"
  assert found.best == pytest.approx(0.03)
  assert found.worst == pytest.approx(0.0532)
  assert found.mfu(found.best) == pytest.approx(0.75)
  assert found.mfu(found.worst) == pytest.approx(0.0225 / 0.0532)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)
def test_lines_of_real_devices():
  name = "v5e:4x4"
  devices = topology.arrange((4, 4), topology.devices(name))
  mesh = types.SimpleNamespace(devices=devices)
  collective = hlo.Collective("all-gather", "ici", (0, 4, 8, 12), 1, GB)
  got = roofline.collective_seconds(collective, topology.parse(name), mesh)
  assert got == pytest.approx(0.75 / 50)
