"""Folders of files: those of one name but for the ending are one record."""

from collections.abc import Sequence
import os

from mmjax.data.sources.limits import DEFAULT, Limits
from mmjax.data.sources.records import (
    BadRecord,
    Record,
    check_index,
    directory,
)

FOLDER = "folder"


class Folder:
  """The files below a directory.

  `cats/01.jpg` and `cats/01.txt` are one record with the fields `jpg`, `txt`
  and `folder` ("cats"). Endings are in lower case; hidden files and files
  without an ending are left out.
  Directories that are links are not entered.

  Attributes:
    fields: the endings there are, and `folder`.
  """

  def __init__(
      self,
      path: str,
      endings: Sequence[str] | None = None,
      limits: Limits = DEFAULT,
  ) -> None:
    """Lists the files; none is read.

    Args:
      path: the directory.
      endings: the fields to read; by default all.
      limits: of which `size` holds for every file.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if no file in it has one of the endings.
    """
    self.path = directory(path, "Folder")
    self._limits = limits
    wanted = None if endings is None else {e.lower() for e in endings}
    groups: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for parent, names, members in os.walk(self.path):
      names[:] = sorted(name for name in names if not name.startswith("."))
      for member in sorted(members):
        stem, dot, ending = member.partition(".")
        ending = ending.lower()
        if not stem or not dot:
          continue
        seen.add(ending)
        if wanted is None or ending in wanted:
          key = os.path.relpath(os.path.join(parent, stem), self.path)
          groups.setdefault(key, {})[ending] = member
    if not groups:
      asked = f" that end in {', '.join(sorted(wanted))}" if wanted else ""
      there = f"; there are {', '.join(sorted(seen))}" if seen else ""
      raise ValueError(f"Folder: no files{asked} below {path}{there}")
    self._keys = sorted(groups)
    self._groups = [groups[key] for key in self._keys]
    endings = sorted({e for group in self._groups for e in group})
    self.fields = tuple(dict.fromkeys([*endings, FOLDER]))

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> Record:
    check_index(index, len(self))
    parent = os.path.dirname(self._keys[index])
    record: Record = {FOLDER: parent} if parent else {}
    for ending, member in self._groups[index].items():
      path = os.path.join(self.path, parent, member)
      try:
        # Of a pipe or a device, opening alone could last for ever.
        if not os.path.isfile(path):
          raise BadRecord(f"{member}: no regular file")
        self._limits.check(size=os.path.getsize(path))
        with open(path, "rb") as file:
          record[ending] = file.read()
      except OSError as error:
        raise BadRecord(f"{member}: {error.strerror}") from None
    return record

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records."""
    return [self[index] for index in indices]

  def name(self, index: int) -> str:
    """The path without its ending."""
    return os.path.join(self.path, self._keys[index])
