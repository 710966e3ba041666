"""TFDS: a directory that TensorFlow Datasets prepared, read without TensorFlow.

It must have been prepared for random access:
`download_and_prepare(file_format="array_record")`, or "parquet". Pictures,
sounds and videos are left encoded, so that they are decoded under our limits.
"""

from collections.abc import Sequence
import os
import re
from typing import Any

from mmjax import config as config_lib
from mmjax.data.sources import records as records_lib
from mmjax.data.sources.records import BadRecord, Record, check_index, optional


class TFDS:
  """A split of a prepared data set.

  Attributes:
    path: the directory with `features.json`.
    split: as in TFDS: "train", "train[10%:]", "train+validation".
    fields: the top-level features.
  """

  def __init__(self, path: str, split: str) -> None:
    """Reads the description of the data set.

    Args:
      path: see the class.
      split: see the class.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if it was not prepared, or for sequential reading only, or
        has no such split.
    """
    self.path = records_lib.directory(path, "TFDS")
    self.split = split
    if not os.path.exists(os.path.join(path, "features.json")):
      raise ValueError(
          f"TFDS: {path} has no features.json: expected the directory of a "
          "version, .../name/config/1.0.0"
      )
    info, self._source = _open(path, split)
    self._length = info.splits[split].num_examples
    self._places = _places(info, split, self._source)
    self.fields = tuple(info.features)

  def __getstate__(self) -> dict[str, Any]:
    """Without open files: each process opens its own."""
    return vars(self) | {"_source": None}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    return self.read([index])[0]

  def read(self, indices: Sequence[int]) -> list[Record]:
    """Several records, read together."""
    for index in indices:
      check_index(index, len(self))
    if self._source is None:
      self._source = _open(self.path, self.split)[1]
    if self._places is not None:
      indices = [self._places[index] for index in indices]
    try:
      return self._source.__getitems__(list(indices))
    except Exception as error:  # Of whatever decodes a broken record.
      raise BadRecord(f"cannot be read: {_first_line(error)}") from None

  def name(self, index: int) -> str:
    """The split and the record."""
    return f"{self.path}:{self.split}:record {index}"


def _open(path: str, split: str) -> tuple[Any, Any]:
  """The description of a data set, and a source of its split."""
  tfds = optional("tensorflow_datasets", "reading a TFDS directory")
  _check_classes(os.path.join(path, "features.json"))
  try:
    builder = tfds.builder_from_directory(path)
    features = builder.info.features
    _check_split(builder.info.splits, split)
    source = builder.as_data_source(split, decoders=_skip(tfds, features))
  except (ValueError, NotImplementedError, OSError) as error:
    raise ValueError(f"TFDS: {path}: {_first_line(error)}") from None
  except ModuleNotFoundError as error:
    # Sounds, for one, which TFDS decodes with TensorFlow.
    raise ValueError(
        f"TFDS: {path} has a feature that needs {error.name}. Its records can "
        "be read without TFDS where they are ArrayRecords: "
        "sources:ArrayRecord, path='.../*-train.array_record-*'"
    ) from None
  return builder.info, source


def _check_classes(path: str) -> None:
  """Refuses features of other packages: TFDS would import what a file names."""
  with open(path, encoding="utf-8", errors="replace") as file:
    text = file.read()
  for name in re.findall(r'"(?:pythonClassName|type)"\s*:\s*"([^"]*)"', text):
    if not name.startswith("tensorflow_datasets."):
      raise ValueError(f"TFDS: {path} names {name!r}, no feature of TFDS")


def _check_split(splits: Any, split: str) -> None:
  """Refuses a split that does not exist or is empty."""
  try:
    found = splits[split]
  except (KeyError, ValueError, AssertionError) as error:
    near = config_lib.nearest(split.partition("[")[0], splits)
    raise ValueError(
        f"no split {split!r}{near}; there are {', '.join(splits)} "
        f"({_first_line(error)})"
    ) from None
  if not found.num_examples:
    raise ValueError(f"split {split!r} is empty")


def _skip(tfds: Any, features: Any) -> dict[str, Any]:
  """Decoders that leave encoded media as they are."""
  media = tfds.features.Image, tfds.features.Video
  found = {}
  for name, feature in features.items():
    if isinstance(feature, media):
      found[name] = tfds.decode.SkipDecoding()
    elif isinstance(feature, tfds.features.FeaturesDict):
      if inner := _skip(tfds, feature):
        found[name] = inner
  return found


def _places(info: Any, split: str, source: Any) -> Sequence[int] | None:
  """Where the examples of a part of a split are in `source`.

  The source of Parquet files ignores which part of its files is asked for.
  """
  if len(source) == info.splits[split].num_examples:
    return None
  places, begin = [], 0
  for part in info.splits[split].file_instructions:
    whole = part.examples_in_shard
    count = whole - part.skip if part.take < 0 else part.take
    places += range(begin + part.skip, begin + part.skip + count)
    begin += whole
  return places


def _first_line(error: Exception) -> str:
  return str(error).split("\n")[0]
