"""The table of chips against what JAX and the TPU compiler say."""

import importlib.util
import re

import jax
import pytest

from mmjax.perf import chips, topology


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_device_kind(kind, name):
  assert chips.from_device_kind(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v5 litepod"])
def test_unknown_device_kind(kind):
  assert chips.from_device_kind(kind) is None


def test_figures_are_ordered_as_the_generations_are():
  v4, v5p, v6e = (chips.CHIPS[name] for name in ("v4", "v5p", "v6e"))
  peaks = [c.peak_flops["bfloat16"] for c in (v4, v5p, v6e)]
  assert peaks == sorted(peaks)
  # Cloud documentation: 1200, 400 and 800 GB/s of both directions per chip.
  links = {"v5p": 1200e9, "v5e": 400e9, "v6e": 800e9, "tpu7x": 1200e9}
  for name, total in links.items():
    chip = chips.CHIPS[name]
    both = 2 * 2 * chip.torus.dims * chip.torus.link_bandwidth
    assert both * chip.devices_per_chip == total


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu not installed"
)
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"]
)
def test_memory_is_what_the_compiler_grants(name):
  device = topology.devices(name)[0]
  chip = topology.parse(name).chip
  assert chips.from_device_kind(device.device_kind) is chip
  place = jax.sharding.SingleDeviceSharding(device)
  huge = jax.ShapeDtypeStruct((2**40,), "float32", sharding=place)
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  granted = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
  assert float(granted[1]) * 2**30 == pytest.approx(chip.hbm_bytes, rel=1e-3)
