"""For which device is a computation traced? It decides who serves a call."""

from typing import Any, NamedTuple

import jax

# "tpu:interpret" and "gpu:interpret" run a kernel without its device, slowly.
INTERPRET = ":interpret"


class Choice(NamedTuple):
  """Who serves a call of a kernel.

  Attributes:
    implementation: its name.
    reason: why, and why not a faster one.
  """

  implementation: str
  reason: str


def kind() -> str:
  """The kind of the devices of the ambient mesh, or of the default ones.

  A mesh may be of devices that this machine lacks: then it is compiled ahead
  of time, and the kernels must be those of its devices.

  Returns:
    For example "cpu", "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None)
  if not mesh.empty and device is not None:
    return device.device_kind
  return jax.devices()[0].device_kind


def platform(device_kind: str) -> str:
  """The platform of a kind of device: "tpu", "cpu" or "gpu"."""
  name = device_kind.lower()
  if name.startswith("tpu"):
    return "tpu"
  return "cpu" if name == "cpu" else "gpu"


def is_hopper(device_kind: str) -> bool:
  """Whether a GPU has the instructions of our GPU kernels (sm_90a)."""
  return any(name in device_kind for name in ("H100", "H20", "H800"))
