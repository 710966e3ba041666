"""What is a record, and what can every source of records do?

A record is what lies on disk: a dict of raw fields, of which media are the
bytes of their files. `Examples` (examples.py) turns records into examples.
"""

from collections.abc import Iterable, Mapping, Sequence
import glob
import importlib
import itertools
import json
import os
import re
from typing import Any, Protocol, TypeAlias

from mmjax.config import nearest

# Values are bytes, str, int, float, bool, arrays, lists or dicts of them.
Record: TypeAlias = dict[str, Any]

_EXTRAS = {"av": "video", "array_record": ""}


class BadRecord(ValueError):
  """A record that cannot be read or decoded; the message says why."""


class Records(Protocol):
  """Random access to records; it can be pickled and opens its files lazily.

  Attributes:
    fields: the names that records may have, of which one may lack some.
  """

  fields: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record:
    """One record.

    Raises:
      BadRecord: if it cannot be read.
      IndexError: if `index` is not in [0, len).
    """
    ...

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records, which is faster than one by one where files allow it.

    Raises:
      BadRecord: if any of them cannot be read.
    """
    ...

  def name(self, index: int) -> str:
    """Where the record is, for people."""
    ...


def check_index(index: int, length: int) -> None:
  """Refuses an index outside [0, length)."""
  if not 0 <= index < length:
    raise IndexError(f"index {index} of {length} records")


def optional(package: str, what: str) -> Any:
  """Imports a package that not every installation has.

  Raises:
    ValueError: with the install command, if it is missing.
  """
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:
    if error.name != package.partition(".")[0]:
      raise
    extra = _EXTRAS.get(package, "data")
    raise ValueError(
        f"{what} needs the package {package!r}, which is not installed: "
        f'pip install "mmjax[{extra}]"'
    ) from None


def files(path: str | Sequence[str], what: str) -> list[str]:
  """The files that a path names.

  Args:
    path: one or several of: a file, a pattern with `*`, `?` or `[...]`, or one
      with braces, `{000..123}` and `{train,extra}`, each of whose files must
      exist.
    what: what the files are, for messages.

  Raises:
    FileNotFoundError: one message with every path that names nothing.
    ValueError: if there is no path, or a file comes twice.
  """
  patterns = [path] if isinstance(path, str) else list(path)
  if not patterns:
    raise ValueError(f"{what}: no path given")
  found, missing = [], []
  for name in itertools.chain.from_iterable(map(braces, patterns)):
    if os.path.isfile(name):
      found.append(name)
    elif matches := sorted(filter(os.path.isfile, glob.glob(name))):
      found += matches
    else:
      missing.append(name)
  if missing:
    lines = "".join(f"\n  {name}{_hint(name)}" for name in missing[:10])
    more = f"\n  and {len(missing) - 10} more" if len(missing) > 10 else ""
    raise FileNotFoundError(f"{what}: there are no such files:{lines}{more}")
  if len(set(found)) < len(found):
    twice = next(name for name in found if found.count(name) > 1)
    raise ValueError(f"{what}: {twice} is named twice")
  return found


def braces(pattern: str) -> list[str]:
  """Expands `{a,b}` and `{007..012}`, as a shell does; others stay.

  Raises:
    ValueError: if a range runs backwards, or names more than a million files.
  """
  found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
  if found is None:
    return [pattern]
  body = found[1]
  if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", body):
    first, last = int(bounds[1]), int(bounds[2])
    if not first <= last < first + 10**6:
      raise ValueError(
          f"{pattern}: {{{body}}} must count upwards, a million at most"
      )
    width = len(bounds[1]) if bounds[1].startswith("0") else 0
    words = [f"{i:0{width}}" for i in range(first, last + 1)]
  else:
    words = body.split(",")
  head, tail = pattern[: found.start()], braces(pattern[found.end() :])
  return [f"{head}{word}{rest}" for word in words for rest in tail]


def directory(path: str, what: str) -> str:
  """`path`, if it is a directory.

  Raises:
    FileNotFoundError: if it is none.
  """
  if not os.path.isdir(path):
    found = "a file" if os.path.exists(path) else "nothing"
    raise FileNotFoundError(
        f"{what}: expected a directory at {path}, found {found}{_hint(path)}"
    )
  return path


def _hint(path: str) -> str:
  """The nearest name beside a missing one."""
  folder, name = os.path.split(path.rstrip("/"))
  if not os.path.isdir(folder or "."):
    return f" (nor a directory {folder})"
  near = nearest(name, os.listdir(folder or "."))
  return near.replace("; did", ", did")


def find(record: Mapping[str, Any], field: str) -> Any:
  """The value of a field.

  Args:
    record: raw fields.
    field: a name; `a.b` is also entry b of a dict or JSON text a; of `x;y`
      the first that is there.

  Raises:
    BadRecord: if the record lacks it.
  """
  for name in field.split(";"):
    head = _head(name, record)
    if head is None:
      continue
    value = record[head]
    for part in filter(None, name[len(head) + 1 :].split(".")):
      value = _entry(value, part, name)
    return value
  raise BadRecord(f"no field {field!r}, only {', '.join(record) or 'none'}")


def check_field(field: str, fields: Sequence[str], where: str) -> None:
  """Refuses a field that no record has, naming the nearest.

  Raises:
    ValueError: if none of the alternatives of `field` is in `fields`.
  """
  if all(_head(name, fields) is None for name in field.split(";")):
    raise ValueError(
        f"{where}: the records have no field {field!r}"
        f"{nearest(field, fields)}; they have {', '.join(fields) or 'none'}"
    )


def _head(name: str, fields: Iterable[str]) -> str | None:
  """The longest of `fields` that `name` is, or begins with before a dot."""
  while name not in fields:
    name, dot, _ = name.rpartition(".")
    if not dot:
      return None
  return name


def _entry(value: Any, part: str, name: str) -> Any:
  if isinstance(value, (bytes, str)):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError) as error:
      raise BadRecord(f"{name!r}: not JSON: {error}") from None
  if not isinstance(value, Mapping) or part not in value:
    raise BadRecord(f"{name!r}: no entry {part!r}")
  return value[part]
