"""Parquet: each row is a record, each column a field.

Parquet is read a row group at a time, and a row costs its whole group. The
last groups are kept, up to a number of bytes: where an epoch in random order
does not fit in it, turn the files into ArrayRecords (`mmjax data convert`).
"""

import bisect
import collections
from collections.abc import Sequence
import itertools
import threading
from typing import Any

from mmjax.data.sources import records as records_lib
from mmjax.data.sources.records import BadRecord, Record, check_index, optional


class Parquet:
  """The rows of one or many Parquet files; a null is a missing field.

  Attributes:
    paths: the files.
    fields: the columns that any of them has.
  """

  def __init__(
      self,
      path: str | Sequence[str],
      columns: Sequence[str] | None = None,
      cache_bytes: int = 512 * 2**20,
  ) -> None:
    """Reads the footers of the files.

    Args:
      path: files, or patterns: "part-{000..131}.parquet".
      columns: those to read; by default all.
      cache_bytes: of the row groups that are kept in memory.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: one message with every file that is no Parquet file; or if a
        column does not exist, or there are no rows.
    """
    self.paths = records_lib.files(path, "Parquet")
    rows, self._columns = _footers(self.paths)
    names = list(dict.fromkeys(itertools.chain.from_iterable(self._columns)))
    for column in columns or ():
      records_lib.check_field(column, names, "Parquet.columns")
    self.fields = tuple(names if columns is None else columns)
    # Of all row groups the file, the place in it, and where they end.
    self._groups = [
        (file, group)
        for file, counts in enumerate(rows)
        for group in range(len(counts))
    ]
    counts = itertools.chain.from_iterable(rows)
    self._ends = list(itertools.accumulate(counts))
    if not self._ends or not self._ends[-1]:
      raise ValueError(f"Parquet: no rows in {', '.join(self.paths[:3])}")
    self._cache_bytes = cache_bytes
    self._clear()

  def _clear(self) -> None:
    # A ParquetFile must not be read by two threads at once.
    self._lock = threading.Lock()
    self._open: dict[int, Any] = {}
    self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()

  def __getstate__(self) -> dict[str, Any]:
    """Without open files: each process opens its own."""
    private = ("_lock", "_open", "_cache")
    return {k: v for k, v in vars(self).items() if k not in private}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._clear()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    check_index(index, len(self))
    group = bisect.bisect_right(self._ends, index)
    return self._row(self._load(group), group, index)

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records; each row group is read once."""
    by_group: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
      check_index(index, len(self))
      group = bisect.bisect_right(self._ends, index)
      by_group.setdefault(group, []).append(place)
    found: list[Record] = [{} for _ in indices]
    for group, places in by_group.items():
      table = self._load(group)
      for place in places:
        found[place] = self._row(table, group, indices[place])
    return found

  def name(self, index: int) -> str:
    """The file and the row."""
    group = bisect.bisect_right(self._ends, index)
    file, number = self._groups[group]
    first = self._ends[group - number - 1] if group > number else 0
    return f"{self.paths[file]}:row {index - first}"

  def _row(self, table: Any, group: int, index: int) -> Record:
    row = index - (self._ends[group - 1] if group else 0)
    values = zip(table.column_names, table.columns)
    record = {name: column[row].as_py() for name, column in values}
    return {name: value for name, value in record.items() if value is not None}

  def _load(self, group: int) -> Any:
    """The table of a row group.

    Raises:
      BadRecord: if it cannot be decoded.
    """
    with self._lock:
      if group in self._cache:
        self._cache.move_to_end(group)
        return self._cache[group]
      file, number = self._groups[group]
      try:
        if file not in self._open:
          pq = optional("pyarrow.parquet", "reading Parquet")
          self._open[file] = pq.ParquetFile(
              self.paths[file], page_checksum_verification=True
          )
        own = [name for name in self.fields if name in self._columns[file]]
        table = self._open[file].read_row_group(
            number, columns=own, use_threads=False
        )
      except (ValueError, OSError) as error:  # Those of pyarrow are both.
        raise BadRecord(f"row group {number}: {error}") from None
      self._cache[group] = table
      held = sum(kept.nbytes for kept in self._cache.values())
      while held > self._cache_bytes and len(self._cache) > 1:
        held -= self._cache.popitem(last=False)[1].nbytes
      return table


def _footers(paths: Sequence[str]) -> tuple[list[list[int]], list[list[str]]]:
  """Of every file the rows of its row groups, and its columns."""
  pq = optional("pyarrow.parquet", "reading Parquet")
  rows, columns, faults = [], [], []
  for path in paths:
    try:
      with pq.ParquetFile(path) as file:
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        rows.append([group.num_rows for group in groups])
        columns.append(list(file.schema_arrow.names))
    except (ValueError, OSError) as error:
      faults.append(f"\n  {path}: {error}")
  if faults:
    raise ValueError("Parquet: cannot be read:" + "".join(faults[:20]))
  return rows, columns
