"""Names of slices, and meshes over devices that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.perf import topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)


@pytest.mark.parametrize(
    ("name", "shape", "slices", "devices"),
    [
        ("v5e:4x4", (4, 4), 1, 16),
        ("v5p:4x4x8", (4, 4, 8), 1, 128),
        ("v4:2x2x4", (2, 2, 4), 1, 16),
        ("v6e:1x1", (1, 1), 1, 1),
        ("tpu7x:2x2x1", (2, 2, 1), 1, 8),
        ("v5e:4x4*2", (4, 4), 2, 32),
    ],
)
def test_parse(name, shape, slices, devices):
  found = topology.parse(name)
  assert (found.shape, found.slices) == (shape, slices)
  assert found.num_devices == devices
  assert str(found) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "expected CHIP:SHAPE"),
        ("v5e:4x", "expected CHIP:SHAPE"),
        ("v9:4x4", "unknown chip 'v9'; known: v4, v5e, v5p, v6e, tpu7x"),
        ("h100:2x2", "unknown chip"),
        ("v5e:3x3", "no slice of shape 3x3; known: 1x1, 2x2, 2x4"),
        ("v5e:4x4x4", "no slice of shape 4x4x4"),
        ("v5p:4x4", "known: 2x2x1"),
        ("v5p:8x4x4", "with A <= B <= C"),
        ("v5p:0x4x4", "no slice of shape"),
        ("v5p:16x16x28", "at most 6144 chips"),
        ("v5e:4x4*0", "at least one slice"),
    ],
)
def test_bad_names(name, message):
  with pytest.raises(ValueError, match=message.replace("*", r"\*")):
    topology.parse(name)


def test_rings_close_where_the_hardware_closes_them():
  assert topology.parse("v5e:8x16").wraps == (False, True)
  assert topology.parse("v5p:4x4x8").wraps == (True, True, True)
  assert topology.parse("v5p:2x4x4").wraps == (False, False, False)


def test_missing_libtpu_says_what_to_install(monkeypatch):
  monkeypatch.setattr(topology, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match=r'pip install "libtpu==[\d.]+\*"'):
    topology.devices("v5e:4x4")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x4*2", "v4:2x2x1"])
def test_devices_leave_the_cpu_alone(name):
  before = jax.devices()
  devices = topology.devices(name)
  assert len(devices) == topology.parse(name).num_devices
  assert {d.platform for d in devices} == {"tpu"}
  assert jax.devices() == before
  assert jax.jit(lambda x: x + 1)(jnp.int32(1)) == 2


def _hops(a, b):
  return sum(abs(i - j) for i, j in zip(a.coords, b.coords))


@pytest.mark.slow
@needs_libtpu
def test_arrange_keeps_neighbours_together():
  devices = topology.devices("v5e:4x4")
  mesh = topology.arrange((2, 4, 2), devices)
  assert mesh.shape == (2, 4, 2)
  assert {d.id for d in mesh.flat} == {d.id for d in devices}
  # Groups of the middle axis are whole lines of the torus.
  for i, j in np.ndindex(2, 2):
    line = mesh[i, :, j]
    assert [_hops(a, b) for a, b in zip(line, line[1:])] == [1, 1, 1]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("v5e:2x2*2", (2, 4), [[0] * 4, [1] * 4]),
        ("v5e:2x2*2", (1, 8), [[0] * 4 + [1] * 4]),
        # No axis takes all four slices.
        ("v5e:1x1*4", (2, 2), [[0, 1], [2, 3]]),
    ],
)
def test_arrange_puts_slices_on_the_first_axes(name, sizes, expected):
  mesh = topology.arrange(sizes, topology.devices(name))
  assert np.vectorize(lambda d: d.slice_index)(mesh).tolist() == expected
