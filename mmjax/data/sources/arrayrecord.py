"""ArrayRecord: files made for random access, a record or many at a time."""

from collections.abc import Sequence
from typing import Any

from mmjax.data.sources import records as records_lib
from mmjax.data.sources import tf_example
from mmjax.data.sources.records import BadRecord, Record, check_index, optional

PAYLOADS = ("example", "bytes")
DATA = "data"


class ArrayRecord:
  """The records of one or many ArrayRecord files.

  Attributes:
    paths: the files.
    fields: those of the first record.
  """

  def __init__(
      self, path: str | Sequence[str], payload: str = "example"
  ) -> None:
    """Reads the indices of the files.

    Args:
      path: files, or patterns: "train-{00..15}.arrayrecord".
      payload: "example", a tf.train.Example; or "bytes", which become the
        field `data`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a file is no ArrayRecord, there are no records, or the
        first is no tf.train.Example though it should be.
    """
    if payload not in PAYLOADS:
      raise ValueError(
          f"ArrayRecord.payload={payload!r}: expected {' or '.join(PAYLOADS)}"
      )
    self.paths = records_lib.files(path, "ArrayRecord")
    self._payload = payload
    self._source = _open(self.paths)
    if not len(self):
      raise ValueError(f"ArrayRecord: no records in {self.paths[0]}")
    self.fields = _fields(self)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    return self.read([index])[0]

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records, in one read a file."""
    for index in indices:
      check_index(index, len(self))
    try:
      found = self._source.__getitems__(list(indices))
    except (RuntimeError, ValueError, OSError, IndexError) as error:
      raise BadRecord(f"cannot be read: {_first_line(error)}") from None
    if self._payload == "bytes":
      return [{DATA: data} for data in found]
    return [tf_example.parse(data) for data in found]

  def name(self, index: int) -> str:
    """The file and the record."""
    file, place = self._source._reader_idx_and_position(index)
    return f"{self.paths[file]}:record {place}"


def _open(paths: Sequence[str]) -> Any:
  """The source of the package, which opens files lazily and can be pickled."""
  module = optional(
      "array_record.python.array_record_data_source", "reading ArrayRecords"
  )
  faults = []
  for path in paths:
    try:
      module.ArrayRecordDataSource([path])
    except (RuntimeError, ValueError, OSError) as error:
      faults.append(f"\n  {path}: {_first_line(error)}")
  if faults:
    raise ValueError("ArrayRecord: cannot be read:" + "".join(faults[:20]))
  return module.ArrayRecordDataSource(list(paths))


def _fields(source: ArrayRecord) -> tuple[str, ...]:
  """The fields of the first record that can be read, of the first few."""
  fault = None
  for index in range(min(len(source), 8)):
    try:
      return tuple(source[index])
    except BadRecord as error:
      fault = fault or error
  raise ValueError(
      f"ArrayRecord: {source.name(0)}: {fault}; payload='bytes' gives records "
      "as they are"
  )


def _first_line(error: Exception) -> str:
  return str(error).split("\n")[0]
