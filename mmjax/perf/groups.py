"""Which devices talk to each other? The groups of a collective, from its HLO.

XLA writes them in several ways: as lists, as a reshaped and transposed range,
or as axes of a mesh. One group is enough, since all are alike.
"""

import math
import re

import numpy as np


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r"\d+", text)))


def first(attributes: str, num_partitions: int) -> tuple[int, ...]:
  """The first group of a collective; all partitions if none is written."""
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    numbers = _numbers(pairs[1])
    target = dict(zip(numbers[::2], numbers[1::2]))
    ring = [numbers[0]]
    while (after := target.get(ring[-1])) is not None and after not in ring:
      ring.append(after)
    return tuple(ring)
  groups = re.search(r"replica_groups=(.*)", attributes)
  if not groups or groups[1].startswith("{}"):
    return tuple(range(num_partitions))
  listed = re.match(r"\{\{([\d,]*)\}", groups[1])
  if listed:
    return _numbers(listed[1])
  iota = re.match(r"\[\d+,(\d+)\]<=(\S+)", groups[1])
  if iota:
    return tuple(_iota(iota[2])[: int(iota[1])].tolist())
  mesh = re.match(
      r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", groups[1]
  )
  if mesh:
    return _mesh_group(*mesh.groups())
  raise ValueError(f"unknown form of replica_groups: {groups[1][:200]}")


def _iota(text: str) -> np.ndarray:
  """`[4,2]T(1,0)`: arange(8) in the shape (4, 2), transposed, flattened."""
  dims, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
  ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order) if order else None).flatten()


def _mesh_group(sizes: str, ids: str | None, axes: str) -> tuple[int, ...]:
  """The first group of a mesh with named axes, `'a'=4,'b'=2`.

  A group spans whole axes, `'a'`, or parts of them, `'a':(2)2`: the two in the
  middle, after two outer ones.
  """
  names = re.findall(r"(\w+)'?=", sizes)
  size = dict(zip(names, _numbers(re.sub(r"\w+'?=", "", sizes))))
  stride = {
      name: math.prod(list(size.values())[place + 1:])
      for place, name in enumerate(names)
  }
  devices = np.arange(math.prod(size.values()))
  if ids:
    devices = _iota(ids) if ids.startswith("[") else np.array(_numbers(ids))
  places = np.zeros(1, int)
  for name, part in re.findall(r"'?(\w+)'?(?::(\(\d+\)\d+))?", axes):
    outer, middle = _numbers(part) if part else (1, size[name])
    inner = size[name] // (outer * middle)
    steps = np.arange(middle) * inner * stride[name]
    places = np.add.outer(places, steps).flatten()
  return tuple(devices[places].tolist())


def between_slices(attributes: str) -> tuple[int, ...]:
  """The slices of a transfer between slices.

  Either `"{1,2}x{0:15}"`, these slices and all their devices, or groups of
  devices numbered slice * 100000 + device.
  """
  target = re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', attributes)
  if not target:
    return ()
  return tuple(n // 100000 or n for n in _numbers(target[1]))
