"""How are records written? In shards, whole or not at all.

Everything goes to a directory beside the one asked for, which gets its name
when all of it is there. Fields keep their names and bytes; a record gets its
number for a key, so that no name of the source becomes a path.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from typing import Any

import numpy as np

from mmjax import config as config_lib
from mmjax.data.sources import tf_example, webdataset
from mmjax.data.sources.records import BadRecord, Record, Records, optional

ROW_GROUP = 64

# Writes one shard: (path without its ending, records, fields).
Writer = Callable[[str, Iterable[tuple[int, Record]], Sequence[str]], None]


def convert(
    records: Records,
    out: str,
    kind: str,
    shard_size: int = 1000,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[int, list[str]]:
  """Writes records in another form.

  Args:
    records: what to write. Those that cannot be read are left out.
    out: a directory that does not exist yet.
    kind: one of `WRITERS`.
    shard_size: records a shard.
    track: passes the indices on and shows how far they are.

  Returns:
    The number of records written, and what was wrong with the others.

  Raises:
    FileExistsError: if there is something at `out`.
    ValueError: if a field or a value has no place in that form, no record can
      be read, or the kind does not exist.
  """
  write = config_lib.pick(WRITERS, kind, "kind")
  if shard_size < 1:
    raise ValueError(f"shard_size={shard_size}: expected at least 1")
  faults: list[str] = []
  with _whole(out) as part:
    found = _readable(records, iter(track(range(len(records)))), faults)
    shards = itertools.count()
    for first in found:
      # A shard at a time, and of most forms a record at a time, is in memory.
      rows = itertools.chain([first], itertools.islice(found, shard_size - 1))
      path = os.path.join(part, f"{next(shards):05}")
      write(path, rows, records.fields)
    count = len(records) - len(faults)
    if not count:
      raise ValueError(f"none of the records can be read: {faults[0]}")
  return count, faults


@contextlib.contextmanager
def _whole(out: str) -> Iterator[str]:
  """A directory that becomes `out` at the end, or vanishes."""
  out = out.rstrip("/")
  if os.path.lexists(out):
    raise FileExistsError(f"{out} exists; remove it, or name another directory")
  part = f"{out}.part-{os.getpid()}"
  os.makedirs(part)
  try:
    yield part
    os.rename(part, out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _readable(
    records: Records, indices: Iterator[int], faults: list[str]
) -> Iterator[tuple[int, Record]]:
  """Numbered records; what is wrong with the others goes to `faults`."""
  number = 0
  for index in indices:
    try:
      record = _flat(records[index])
    except BadRecord as error:
      faults.append(f"{records.name(index)}: {error}")
      continue
    for field in record:
      if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", field):
        raise ValueError(
            f"{records.name(index)}: field {field!r}: expected letters, "
            "digits, _, - and single dots"
        )
    yield number, record
    number += 1


def _flat(record: Mapping[str, Any], prefix: str = "") -> Record:
  """Entries of dicts under dotted names; the source's own keys are left out."""
  flat: Record = {}
  for name, value in record.items():
    if isinstance(value, Mapping):
      flat |= _flat(value, f"{prefix}{name}.")
    elif value is not None and name != webdataset.KEY:
      flat[f"{prefix}{name}"] = value
  return flat


def _file(value: Any) -> bytes:
  """A value as the bytes of a file: media as they are, others as text."""
  if isinstance(value, (bytes, bytearray, memoryview)):
    return bytes(value)
  if isinstance(value, str):
    return value.encode()
  if isinstance(value, np.ndarray):
    return tf_example.npy(value)
  if isinstance(value, np.generic):
    value = value.item()
  try:
    return json.dumps(value, ensure_ascii=False).encode()
  except TypeError as error:
    raise ValueError(f"cannot be written as a file: {error}") from None


def _write_tar(
    path: str, rows: Iterable[tuple[int, Record]], fields: Sequence[str]
) -> None:
  del fields
  with tarfile.open(f"{path}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
    for number, record in rows:
      for field, value in record.items():
        data = _file(value)
        member = tarfile.TarInfo(f"{number:09}.{field}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def _write_folder(
    path: str, rows: Iterable[tuple[int, Record]], fields: Sequence[str]
) -> None:
  del fields
  os.mkdir(path)
  for number, record in rows:
    for field, value in record.items():
      with open(os.path.join(path, f"{number:09}.{field}"), "wb") as file:
        file.write(_file(value))


def _write_arrayrecord(
    path: str, rows: Iterable[tuple[int, Record]], fields: Sequence[str]
) -> None:
  del fields
  module = optional(
      "array_record.python.array_record_module", "writing ArrayRecords"
  )
  # One record a chunk: they are read at random. Media are compressed already.
  options = "group_size:1,uncompressed"
  writer = module.ArrayRecordWriter(f"{path}.arrayrecord", options)
  try:
    for _, record in rows:
      writer.write(tf_example.serialise(record))
  finally:
    writer.close()


def _write_parquet(
    path: str, rows: Iterable[tuple[int, Record]], fields: Sequence[str]
) -> None:
  pa = optional("pyarrow", "writing Parquet")
  pq = optional("pyarrow.parquet", "writing Parquet")
  records = [record for _, record in rows]
  names = dict.fromkeys(f for f in fields if f != webdataset.KEY)
  names |= dict.fromkeys(name for record in records for name in record)
  columns = {}
  for name in names:
    values = [_cell(record.get(name)) for record in records]
    try:
      columns[name] = pa.array(values)
    except (ValueError, TypeError) as error:
      raise ValueError(f"column {name!r}: unlike values: {error}") from None
  table = pa.table({k: v for k, v in columns.items() if v.null_count < len(v)})
  pq.write_table(
      table,
      f"{path}.parquet",
      row_group_size=ROW_GROUP,
      write_page_checksum=True,
  )


def _cell(value: Any) -> Any:
  if isinstance(value, np.ndarray):
    return value.tolist() if value.ndim == 1 else tf_example.npy(value)
  return value.item() if isinstance(value, np.generic) else value


WRITERS: dict[str, Writer] = {
    "arrayrecord": _write_arrayrecord,
    "folder": _write_folder,
    "parquet": _write_parquet,
    "webdataset": _write_tar,
}
