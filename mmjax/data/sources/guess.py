"""Which kind of data lies at a path? For the command line."""

import glob
import os

from mmjax import config as config_lib
from mmjax.data.sources.arrayrecord import ArrayRecord
from mmjax.data.sources.folder import Folder
from mmjax.data.sources.parquet import Parquet
from mmjax.data.sources.records import Records
from mmjax.data.sources.tfds import TFDS
from mmjax.data.sources.webdataset import WebDataset

KINDS = {
    "webdataset": WebDataset,
    "parquet": Parquet,
    "arrayrecord": ArrayRecord,
    "tfds": TFDS,
    "folder": Folder,
}
ENDINGS = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}


def open_records(source: str, split: str | None = None) -> Records:
  """The records at a path.

  Args:
    source: a file, a pattern or a directory, whose kind is guessed; or
      "KIND:PATH" with one of `KINDS`. A directory that holds tars, Parquet
      files or ArrayRecords means all of them.
    split: of a TFDS directory.

  Raises:
    ValueError: if the kind cannot be guessed or does not exist, or `split` is
      missing or has no meaning; and what the kind itself raises.
    FileNotFoundError: if there is nothing.
  """
  kind, colon, path = source.partition(":")
  if not colon or os.path.exists(source):
    kind, path = _guess(source)
  make = config_lib.pick(KINDS, kind, "--source: kind")
  if os.path.isdir(path) and make not in (TFDS, Folder):
    path = _inside(path, kind)
  if make is TFDS:
    if split is None:
      raise ValueError(f"{path}: a TFDS directory needs a split")
    return TFDS(path, split)
  if split is not None:
    raise ValueError(f"split={split!r}: only TFDS directories have splits")
  return make(path)


def _guess(path: str) -> tuple[str, str]:
  if os.path.isdir(path):
    names = os.listdir(path)
    if "features.json" in names:
      return "tfds", path
    found = {ENDINGS[e] for n in names if (e := _ending(n)) in ENDINGS}
    if len(found) > 1:
      raise ValueError(
          f"{path} holds {' and '.join(sorted(found))}: say which, KIND:PATH"
      )
    return (found.pop() if found else "folder"), path
  ending = _ending(path)
  if ending not in ENDINGS:
    if not os.path.exists(path) and not glob.has_magic(path):
      raise FileNotFoundError(f"there is nothing at {path}")
    raise ValueError(
        f"{path}: cannot tell its kind; say it as KIND:PATH with one of "
        f"{', '.join(KINDS)}"
    )
  return ENDINGS[ending], path


def _ending(path: str) -> str:
  # Those of TFDS go on with the number of the shard.
  name = os.path.basename(path).split("-of-")[0]
  root, ending = os.path.splitext(name)
  return ending.partition("-")[0].lower() if root else ""


def _inside(folder: str, kind: str) -> str:
  """A pattern for the files of a kind in a directory."""
  endings = [ending for ending, of in ENDINGS.items() if of == kind]
  for ending in endings:
    pattern = os.path.join(glob.escape(folder), f"*{ending}*")
    if glob.glob(pattern):
      return pattern
  raise ValueError(f"{folder}: no files that end in {' or '.join(endings)}")
