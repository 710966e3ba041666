"""What can a chip do at best: peak FLOP/s, memory and links, as published.

All figures are per JAX device. On TPU v4 and v5p one device is a whole chip
(two TensorCores, "megacore"); on TPU7x each of the two TensorCores of a chip is
a device of its own and gets half of the chip's figures.

Sources:
  * TPUs: the system architecture pages of the Google Cloud TPU documentation
    (v4, v5e, v5p, v6e, tpu7x): peak compute, HBM bandwidth, bidirectional ICI
    bandwidth (halved here and divided by the links), data centre bandwidth.
  * TPU v4's links (6 of 50 GB/s): Jouppi et al. 2023, "TPU v4: An Optically
    Reconfigurable Supercomputer", table 4. Its data centre bandwidth is not
    published; the value is the burst that PaLM reports (Chowdhery et al. 2022,
    section 4: 81 Tb/s over the hosts of 6144 chips): reached, not a limit.
  * `hbm_bytes` of TPUs: what the TPU compiler grants a program, a little less
    than the advertised 16, 32, 95 or 192 GiB.
  * GPUs: NVIDIA's data sheets of A100, H100 and H200 (SXM), without sparsity.
"""

from collections.abc import Mapping
import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Torus:
  """The links between the chips of a TPU slice, and between slices.

  Attributes:
    dims: dimensions of the torus, 2 or 3.
    link_bandwidth: bytes/s of one link in one direction, per device.
    wrap: a dimension closes into a ring when its extent is a multiple of this.
    max_chips: chips of the largest slice.
    dcn_bandwidth: bytes/s per device, one way, over the data centre network.
  """

  dims: int
  link_bandwidth: float
  wrap: int
  max_chips: int
  dcn_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Chip:
  """Best-case figures of one device.

  Attributes:
    name: short name, as in `v5e:4x4`.
    kinds: the `device_kind` strings under which JAX reports it.
    peak_flops: dense matrix FLOP/s by operand dtype. float32 is the rate of
      JAX's default precision: one bfloat16 pass on a TPU, TF32 on a GPU.
    hbm_bytes: memory that a program can use.
    hbm_bandwidth: bytes/s.
    torus: links of a TPU; None for a GPU, whose network the machine decides.
    devices_per_chip: JAX devices that share one chip.
  """

  name: str
  kinds: tuple[str, ...]
  peak_flops: Mapping[str, float]
  hbm_bytes: int
  hbm_bandwidth: float
  torus: Torus | None = None
  devices_per_chip: int = 1

  def peak(self, dtype: str) -> float:
    """Dense matrix FLOP/s for operands of `dtype`.

    A dtype without a published figure gets the rate of float32.
    """
    return self.peak_flops.get(dtype, self.peak_flops["float32"])


def _tpu_peak(bf16: float, int8: float | None = None) -> dict[str, float]:
  peak = {"bfloat16": bf16, "float16": bf16, "float32": bf16}
  return peak | ({"int8": int8} if int8 else {})


def _gpu_peak(bf16: float) -> dict[str, float]:
  # Tensor cores run TF32 at half and int8 at twice the rate of bfloat16.
  return {
      "bfloat16": bf16,
      "float16": bf16,
      "float32": bf16 / 2,
      "int8": bf16 * 2,
  }


_TABLE = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        peak_flops=_tpu_peak(275e12, 275e12),
        hbm_bytes=int(30.75 * _GIB),
        hbm_bandwidth=1200e9,
        torus=Torus(3, 50e9, wrap=4, max_chips=4096, dcn_bandwidth=1.65e9),
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=_tpu_peak(197e12, 393e12),
        hbm_bytes=int(15.75 * _GIB),
        hbm_bandwidth=819e9,
        torus=Torus(2, 50e9, wrap=16, max_chips=256, dcn_bandwidth=3.125e9),
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5", "TPU v5p"),
        peak_flops=_tpu_peak(459e12),
        hbm_bytes=int(95.74 * _GIB),
        hbm_bandwidth=2765e9,
        torus=Torus(3, 100e9, wrap=4, max_chips=6144, dcn_bandwidth=6.25e9),
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=_tpu_peak(918e12, 1836e12),
        hbm_bytes=int(31.25 * _GIB),
        hbm_bandwidth=1638e9,
        torus=Torus(2, 100e9, wrap=16, max_chips=256, dcn_bandwidth=12.5e9),
    ),
    Chip(
        name="tpu7x",
        kinds=("TPU7x",),
        peak_flops=_tpu_peak(2307e12 / 2),
        hbm_bytes=int(94.75 * _GIB),
        hbm_bandwidth=7380e9 / 2,
        torus=Torus(3, 50e9, wrap=4, max_chips=9216, dcn_bandwidth=6.25e9),
        devices_per_chip=2,
    ),
    Chip(
        name="a100-40gb",
        kinds=("NVIDIA A100-SXM4-40GB",),
        peak_flops=_gpu_peak(312e12),
        hbm_bytes=40 * 10**9,
        hbm_bandwidth=1555e9,
    ),
    Chip(
        name="a100-80gb",
        kinds=("NVIDIA A100-SXM4-80GB",),
        peak_flops=_gpu_peak(312e12),
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=2039e9,
    ),
    Chip(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        peak_flops=_gpu_peak(989.4e12),
        hbm_bytes=80 * 10**9,
        hbm_bandwidth=3350e9,
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        peak_flops=_gpu_peak(989.4e12),
        hbm_bytes=141 * 10**9,
        hbm_bandwidth=4800e9,
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _TABLE}


def from_device_kind(kind: str) -> Chip | None:
  """The chip behind `jax.Device.device_kind`, or None where it is not known.

  A variant with other figures (an H100 PCIe, say) is not known: no MFU is
  better than a wrong one.
  """
  return next((chip for chip in _TABLE if kind in chip.kinds), None)
