"""How do records become examples? Field by field, without the bad ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax import config as config_lib
from mmjax.data.batch import Example
from mmjax.data.sources.fields import Field
from mmjax.data.sources.quarantine import Quarantine
from mmjax.data.sources.records import BadRecord, Record, Records, check_field

# Records tried in the place of a bad one.
TRIES = 16


class Examples:
  """A random-access source of examples out of records.

  A bad record is replaced by another one that its index alone decides, so that
  every process and every run sees the same examples.

  Attributes:
    records: where they come from.
    quarantine: the bad ones so far.
  """

  def __init__(
      self,
      records: Records,
      fields: Mapping[str, Field | Mapping[str, Any]],
      max_bad: float = 0.01,
      quarantine: str | None = None,
      seed: int = 0,
  ) -> None:
    """Joins records with how they are read.

    Args:
      records: where they come from.
      fields: key of the example -> what makes it of a record: one of
        `sources.fields`, or its config node.
      max_bad: share of the records that may be bad before reading stops.
      quarantine: a file to list the bad ones in; `mmjax train` lists them in
        the run directory otherwise.
      seed: chooses replacements.

    Raises:
      ValueError: if there are no records or no fields, a field that no record
        has, or a config node that is wrong.
    """
    if not len(records):
      raise ValueError(f"{type(records).__name__}: no records")
    if not fields:
      raise ValueError("Examples.fields: needs at least one key")
    self.records = records
    self.quarantine = Quarantine(len(records), max_bad, quarantine)
    self._seed = seed
    self._fields: dict[str, Field] = {
        key: config_lib.build(node, f"fields.{key}")
        if isinstance(node, Mapping)
        else node
        for key, node in fields.items()
    }
    for key, field in self._fields.items():
      check_field(field.field, records.fields, f"fields.{key}")

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> Example:
    self.quarantine.read()
    return self._example(index, None)

  def read(self, indices: Sequence[int]) -> list[Example]:
    """Several examples; their records are read together."""
    self.quarantine.read(len(indices))
    try:
      found = self.records.read(indices)
    except BadRecord:  # One by one, to find out which.
      found = [None] * len(indices)
    return [self._example(i, record) for i, record in zip(indices, found)]

  def _example(self, index: int, record: Record | None) -> Example:
    """The example of a record, which is read unless it is given."""
    rng, candidate = None, index
    for _ in range(1 + TRIES):
      if candidate not in self.quarantine:
        try:
          if record is None:
            record = self.records[candidate]
          return {key: field(record) for key, field in self._fields.items()}
        except BadRecord as error:
          name = self.records.name(candidate)
          self.quarantine.add(candidate, name, str(error))
      rng = rng or np.random.default_rng([self._seed, index])
      candidate, record = int(rng.integers(len(self.records))), None
    raise ValueError(
        f"record {index} ({self.records.name(index)}) is bad, and {TRIES} "
        "others tried in its place too: "
        + self.quarantine.message(f"among {len(self.records):,}")
    )
