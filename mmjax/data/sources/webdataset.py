"""WebDataset: tars whose members of one name but for the ending are a record.

The heads of all members are read once; a record is then read where it lies.
Nothing is ever extracted: a member's name is a key, not a path, and links,
devices and directories among the members are passed over.
"""

from collections.abc import Iterator, Sequence
import json
import os
import tarfile
from typing import Any

import numpy as np

from mmjax.data.sources import records as records_lib
from mmjax.data.sources.limits import DEFAULT, Limits
from mmjax.data.sources.records import BadRecord, Record, check_index

KEY = "__key__"


class WebDataset:
  """Records of one or many tars, at random.

  The fields of `a/b/0007.seg.png` are `seg.png` and `__key__` ("a/b/0007").
  Members of a record follow each other in their tar.

  Attributes:
    paths: the tars.
    fields: the endings there are, and `__key__`.
    passed_over: members that are neither files nor directories, by kind.
  """

  def __init__(
      self,
      path: str | Sequence[str],
      index: str | None = None,
      limits: Limits = DEFAULT,
  ) -> None:
    """Reads the heads of all members.

    Args:
      path: tars, or patterns: "cc-{000..331}.tar".
      index: a file that keeps what was found, so that the next process need
        not look again; it is made anew where a tar has changed.
      limits: of which `size` holds for every member.

    Raises:
      FileNotFoundError: if there is no such tar.
      ValueError: one message with every tar that is compressed, broken or
        incomplete, or has a member twice.
    """
    self.paths = records_lib.files(path, "WebDataset")
    self._limits = limits
    self._handles: dict[int, int] = {}
    table = _kept(index, self.paths)
    if table is None:
      table = _scan(self.paths)
      if index is not None:
        _keep(index, self.paths, table)
    self._endings: list[str] = table["endings"]
    self.passed_over: dict[str, int] = table["passed_over"]
    self._keys: list[str] = table["keys"]
    # Of each record its tar and its first member; of each member where it is.
    self._tars, self._firsts = table["tars"], table["firsts"]
    self._members = table["members"]
    if not self._keys:
      raise ValueError(f"WebDataset: no files in {', '.join(self.paths[:3])}")
    self.fields = (*self._endings, KEY)

  def __getstate__(self) -> dict[str, Any]:
    """Without the open files: each process opens its own."""
    return vars(self) | {"_handles": {}}

  def __del__(self) -> None:
    for handle in getattr(self, "_handles", {}).values():
      os.close(handle)

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> Record:
    check_index(index, len(self))
    record: Record = {KEY: self._keys[index]}
    handle = self._open(int(self._tars[index]))
    first, end = self._firsts[index : index + 2]
    for offset, size, ending in self._members[first:end].tolist():
      self._limits.check(size=size)
      try:
        data = os.pread(handle, size, offset)
      except OSError as error:
        raise BadRecord(str(error.strerror)) from None
      if len(data) != size:
        raise BadRecord(f"{len(data):,} of {size:,} bytes are there")
      record[self._endings[ending]] = data
    return record

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records."""
    return [self[index] for index in indices]

  def name(self, index: int) -> str:
    """The tar and the key."""
    return f"{self.paths[self._tars[index]]}:{self._keys[index]}"

  def _open(self, tar: int) -> int:
    if tar not in self._handles:
      handle = os.open(self.paths[tar], os.O_RDONLY | os.O_CLOEXEC)
      # Another thread may have been faster.
      if self._handles.setdefault(tar, handle) != handle:
        os.close(handle)
    return self._handles[tar]


def _scan(paths: Sequence[str]) -> dict[str, Any]:
  """The members of all tars.

  Returns:
    `endings` and `keys`, lists of str; `tars` i32[N]; `firsts` i64[N + 1];
    `members` i64[M, 3]: offset, size, ending; `passed_over`.
  """
  endings: dict[str, int] = {}
  passed_over: dict[str, int] = {}
  keys: list[str] = []
  tars, firsts, members, faults = [], [], [], []
  for number, path in enumerate(paths):
    previous: str | None = None
    seen: set[str] = set()
    try:
      for member in _members(path):
        if not member.isreg() or member.issparse():
          if not member.isdir():
            kind = "links" if member.issym() or member.islnk() else "others"
            passed_over[kind] = passed_over.get(kind, 0) + 1
          continue
        folder, slash, name = member.name.rpartition("/")
        stem, dot, ending = name.partition(".")
        if not stem or not dot:
          continue
        key, ending = folder + slash + stem, ending.lower()
        if key != previous:
          keys.append(key)
          tars.append(number)
          firsts.append(len(members))
          previous, seen = key, set()
        if ending in seen:
          raise ValueError(f"{member.name} is there twice")
        seen.add(ending)
        code = endings.setdefault(ending, len(endings))
        members.append((member.offset_data, member.size, code))
    except (ValueError, OSError, tarfile.TarError) as error:
      faults.append(f"\n  {path}: {error}")
  if faults:
    raise ValueError(
        "WebDataset: not whole, uncompressed tars:"
        + "".join(faults[:20])
        + "\nFetch them again, or leave them out."
    )
  return dict(
      endings=list(endings),
      keys=keys,
      tars=np.asarray(tars, np.int32),
      firsts=np.asarray([*firsts, len(members)], np.int64),
      members=np.asarray(members, np.int64).reshape(-1, 3),
      passed_over=passed_over,
  )


def _members(path: str) -> Iterator[tarfile.TarInfo]:
  """The members of a tar.

  Raises:
    ValueError: if it is compressed, or ends or breaks off before its end.
  """
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    head = file.read(6)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\0":
      raise ValueError("compressed: records of it cannot be read at random")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members = []  # It would hold all of them.
        end = member.offset_data + (member.size if member.isreg() else 0)
        if end > size:
          raise ValueError(
              f"{member.name} ends at byte {end:,}, the file at {size:,}"
          )
        yield member
      # The module takes a broken head for the end.
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(f"broken at byte {tar.offset:,} of {size:,}")


def _marks(paths: Sequence[str]) -> str:
  """What tells that none of the tars has changed."""
  stats = [os.stat(path) for path in paths]
  return json.dumps([
      [os.path.basename(path), stat.st_size, stat.st_mtime_ns]
      for path, stat in zip(paths, stats)
  ])


def _kept(index: str | None, paths: Sequence[str]) -> dict[str, Any] | None:
  """The table in the file `index`, unless it is of other tars."""
  if index is None or not os.path.exists(index):
    return None
  try:
    with np.load(index, allow_pickle=False) as table:
      words = json.loads(str(table["words"]))
      if words.pop("marks") != _marks(paths):
        return None
      return words | {k: table[k] for k in ("tars", "firsts", "members")}
  except (ValueError, KeyError, OSError, EOFError) as error:
    raise ValueError(
        f"WebDataset.index: {index} is no index ({error}); remove it, or name "
        "another file"
    ) from None


def _keep(index: str, paths: Sequence[str], table: dict[str, Any]) -> None:
  arrays = {k: table[k] for k in ("tars", "firsts", "members")}
  words = {k: table[k] for k in ("endings", "keys", "passed_over")}
  words["marks"] = _marks(paths)
  part = f"{index}.part-{os.getpid()}"
  with open(part, "wb") as file:
    np.savez(file, words=np.asarray(json.dumps(words)), **arrays)
  os.replace(part, index)
