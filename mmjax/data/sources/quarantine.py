"""What happens to records that cannot be read? They are listed and replaced.

A run goes on without a few bad records and stops where they are many: then
something else is wrong.
"""

from collections.abc import Iterable
import json
import math
import os
import pathlib
import threading
from typing import Any


class TooManyBad(ValueError):
  """More bad records than a source allows."""


class Quarantine:
  """The bad records of one source.

  Attributes:
    path: the file that lists them, a JSON object a line, or None.
    share: of the records read so far that may be bad; the first `FIRST` count
      as read from the start.
  """

  FIRST = 1000

  def __init__(
      self, length: int, share: float, path: str | None = None
  ) -> None:
    """An empty quarantine.

    Args:
      length: records of the source.
      share: see the class.
      path: see the class.

    Raises:
      ValueError: if `share` is no share.
    """
    if not 0 <= share <= 1:
      raise ValueError(f"max_bad={share}: expected a share from 0 to 1")
    self.path, self.share = path, share
    self._length = length
    self._reads = 0
    self._entries: dict[int, tuple[str, str]] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    """All but the lock, which cannot be pickled."""
    return {k: v for k, v in vars(self).items() if k != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _lock=threading.Lock())

  def __contains__(self, index: int) -> bool:
    return index in self._entries

  def __len__(self) -> int:
    return len(self._entries)

  def read(self, count: int = 1) -> None:
    """Counts records that were asked for."""
    with self._lock:
      self._reads += count

  def add(self, index: int, name: str, reason: str) -> None:
    """Lists a bad record.

    Raises:
      TooManyBad: if that makes too many.
    """
    with self._lock:
      if index in self._entries:
        return
      self._entries[index] = name, reason
      if self.path is not None:
        _append(self.path, index, name, reason)
      seen = min(max(self._reads, self.FIRST), self._length)
      if len(self._entries) > math.floor(self.share * seen):
        raise TooManyBad(self.message(f"of {seen:,}"))

  def list_in(self, path: str) -> None:
    """Lists bad records in a file, also those so far, unless one is set."""
    with self._lock:
      if self.path is None:
        self.path = path
        for index, (name, reason) in self._entries.items():
          _append(path, index, name, reason)

  def message(self, among: str) -> str:
    """What is wrong, with the first reasons."""
    lines = [f"{name}: {reason}" for name, reason in self._entries.values()]
    shown = "".join(f"\n  {line}" for line in lines[:5])
    more = f"\n  and {len(lines) - 5} more" if len(lines) > 5 else ""
    where = f"\nAll of them are listed in {self.path}." if self.path else ""
    return (
        f"{len(lines)} bad records {among}, more than max_bad={self.share:g} "
        f"allows:{shown}{more}{where}\nMend or leave them out, or allow more "
        "with max_bad."
    )


def of(sources: Iterable[Any]) -> list[Quarantine]:
  """The quarantines of sources, also of those within others (`.source`)."""
  found = []
  for source in sources:
    while source is not None:
      if isinstance(quarantine := getattr(source, "quarantine", None),
                    Quarantine):
        found.append(quarantine)
      source = getattr(source, "source", None)
  return found


def _append(path: str, index: int, name: str, reason: str) -> None:
  """One write in append mode: lines of several processes do not mix."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  line = json.dumps(dict(index=index, record=name, reason=reason)) + "\n"
  if file.exists() and line in file.read_text():  # Of the run before a resume.
    return
  handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
  try:
    os.write(handle, line.encode())
  finally:
    os.close(handle)
