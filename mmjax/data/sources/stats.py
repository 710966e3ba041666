"""What is in a source of records? Counted field by field."""

from collections.abc import Iterable, Iterator
import dataclasses
import json
import statistics
from typing import Any

import numpy as np

from mmjax.data.sources import limits as limits_lib
from mmjax.data.sources import media
from mmjax.data.sources.limits import Limits
from mmjax.data.sources.records import BadRecord, Records


@dataclasses.dataclass
class FieldStats:
  """What one field holds, over all records that were read.

  Attributes:
    kinds: what its values are -> how many.
    sizes: bytes of each value.
    pixels: (width, height) of each picture and video.
    seconds: of each sound and video.
    faults: of how many the head cannot be read.
  """

  kinds: dict[str, int] = dataclasses.field(default_factory=dict)
  sizes: list[int] = dataclasses.field(default_factory=list)
  pixels: list[tuple[int, int]] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)
  faults: int = 0

  def add(self, value: Any, limits: Limits) -> str | None:
    """Counts a value; returns what is wrong with it, if anything is."""
    self.sizes.append(_size(value))
    kind, fault = "", None
    if isinstance(value, (bytes, bytearray, memoryview)):
      kind = limits_lib.kind(value) or ""
      try:
        if found := media.facts(value, limits):
          if found.width:
            self.pixels.append((found.width, found.height))
          if found.seconds:
            self.seconds.append(found.seconds)
      except BadRecord as error:
        self.faults, fault = self.faults + 1, str(error)
    kind = kind or kind_of(value)
    self.kinds[kind] = self.kinds.get(kind, 0) + 1
    return fault

  def summary(self) -> dict[str, Any]:
    """The numbers of a table's row, which JSON can hold."""
    found = dict(
        count=len(self.sizes),
        kinds=self.kinds,
        faults=self.faults,
        bytes=dict(_range(self.sizes), total=sum(self.sizes)),
    )
    if self.pixels:
      width, height = zip(*self.pixels)
      found |= dict(width=_range(width), height=_range(height))
    if self.seconds:
      found["seconds"] = dict(_range(self.seconds), total=sum(self.seconds))
    return found


def collect(
    records: Records, indices: Iterable[int], limits: Limits
) -> dict[str, Any]:
  """Reads records and counts what their fields hold.

  Media are opened, but not decoded.

  Returns:
    `records`, those that were read; `bad`, names and reasons; `fields`, name
    -> `FieldStats.summary()`, those that no record has included.
  """
  fields = {name: FieldStats() for name in records.fields}
  read, bad = 0, []
  for index in indices:
    read += 1
    try:
      record = records[index]
    except BadRecord as error:
      bad.append(f"{records.name(index)}: {error}")
      continue
    for name, value in flat(record):
      fault = fields.setdefault(name, FieldStats()).add(value, limits)
      if fault:
        bad.append(f"{records.name(index)}: {name}: {fault}")
  whole = {n for n in fields if any(o.startswith(f"{n}.") for o in fields)}
  return dict(
      records=read,
      bad=bad,
      fields={n: f.summary() for n, f in fields.items() if n not in whole},
  )


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Names and values, those within dicts under dotted names."""
  for name, value in record.items():
    if isinstance(value, dict):
      yield from flat(value, f"{prefix}{name}.")
    elif value is not None:
      yield f"{prefix}{name}", value


def kind_of(value: Any) -> str:
  """A word for a value that is no medium."""
  if isinstance(value, (bytes, bytearray, memoryview)):
    try:
      value = bytes(value).decode()
    except UnicodeDecodeError:
      return "npy" if bytes(value[:6]) == b"\x93NUMPY" else "bytes"
  if isinstance(value, str):
    return "JSON" if _is_json(value) else "text"
  if isinstance(value, (list, np.ndarray)):
    return "array"
  return type(value).__name__


def _is_json(text: str) -> bool:
  if not text.lstrip().startswith(("{", "[")):
    return False
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def _size(value: Any) -> int:
  if isinstance(value, (bytes, bytearray, memoryview)):
    return len(value)
  if isinstance(value, str):
    return len(value.encode())
  return np.asarray(value).nbytes


def _range(values: Iterable[float]) -> dict[str, float]:
  values = sorted(values)
  if not values:
    return dict(least=0, median=0, most=0)
  return dict(
      least=values[0], median=statistics.median(values), most=values[-1]
  )
