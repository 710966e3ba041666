"""Is a checkpoint what was written, and does it stay in its directory?

The digests are a file that `sha256sum -c SHA256SUMS` reads as well.
"""

from concurrent import futures
import hashlib
import json
import os
import pathlib

DIGESTS = "SHA256SUMS"

# What the storage library adds to a checkpoint behind the digests.
_LATE = {DIGESTS, "_CHECKPOINT_METADATA", "commit_success.txt"}

# Files that are read at once; hashing leaves Python's lock.
_READERS = 8


def write_digests(folder: pathlib.Path) -> None:
  """Writes the digests of all files of a checkpoint, and sees them on disk."""
  lines = [f"{digest}  {name}\n" for name, digest in _digests(folder).items()]
  with (folder / DIGESTS).open("w") as file:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())


def damage(folder: pathlib.Path) -> list[str]:
  """Compares the files of a checkpoint with their digests.

  Args:
    folder: of the checkpoint.

  Returns:
    A line for each file that is missing, changed or was not there; none for a
    whole checkpoint, and for one without digests, which tells nothing.
  """
  try:
    lines = (folder / DIGESTS).read_text().splitlines()
    wanted = {name: digest for digest, name in map(str.split, lines)}
  except FileNotFoundError:
    return []
  except ValueError:
    return [f"{DIGESTS}: unreadable"]
  found = _digests(folder)
  return [
      f"{name}: "
      + (
          "missing"
          if name not in found
          else "was not there"
          if name not in wanted
          else "changed"
      )
      for name in sorted(wanted.keys() | found.keys())
      if wanted.get(name) != found.get(name)
  ]


def _digests(folder: pathlib.Path) -> dict[str, str]:
  """Name -> digest of the files below `folder`, in order."""
  files = {
      str(path.relative_to(folder)): path
      for path in sorted(folder.rglob("*"))
      if path.is_file()
  }
  names = [name for name in files if name not in _LATE]
  with futures.ThreadPoolExecutor(_READERS) as pool:
    found = pool.map(_digest, [files[name] for name in names])
    return dict(zip(names, found))


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def check_closed(folder: pathlib.Path) -> None:
  """Refuses a checkpoint whose keys or links lead outside its directory.

  Keys of the metadata become parts of file paths, so an absolute one, or one
  with "..", would make the storage library read any file.

  Raises:
    ValueError: naming the keys and links, or for unreadable metadata.
  """
  links = [path for path in (folder, *folder.rglob("*")) if path.is_symlink()]
  bad = sorted(map(str, links)) or _open_keys(folder / "state" / "_METADATA")
  if bad:
    raise ValueError(
        f"{folder}: refused, these keys or links may lead outside of it: {bad}"
    )


def _open_keys(path: pathlib.Path) -> list[str]:
  try:
    entries = json.loads(path.read_text())["tree_metadata"].values()
    keys = {
        str(part["key"]) for entry in entries for part in entry["key_metadata"]
    }
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(
        f"{path}: expected the metadata of a checkpoint ({error!r}); the "
        "checkpoint is damaged"
    ) from error
  return sorted(
      key
      for key in keys
      if "/" in key or "\\" in key or key in ("", ".", "..")
  )
