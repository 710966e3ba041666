"""Small sets of files of every kind, whose records say who they are."""

import io
import json
import os
import tarfile
import wave

import numpy as np
from PIL import Image
import pytest

from mmjax.data import sources
from mmjax.data.sources import tf_example

KINDS = ("folder", "webdataset", "parquet", "arrayrecord", "tfds")
# A picture of one grey shade cannot be told from JPEG's rounding of it.
STEP = 4


def shade(index):
  return index * STEP % 256


def picture(index, kind="PNG", size=(12, 10)):
  file = io.BytesIO()
  grey = np.full((size[1], size[0], 3), shade(index), np.uint8)
  Image.fromarray(grey).save(file, kind)
  return file.getvalue()


def sound(seconds=0.1, rate=8000, hertz=440.0, channels=1):
  """A 16-bit WAV file by the standard library."""
  time = np.arange(int(seconds * rate)) / rate
  samples = np.round(0.5 * np.sin(2 * np.pi * hertz * time) * 2**15)
  file = io.BytesIO()
  with wave.open(file, "wb") as out:
    out.setnchannels(channels)
    out.setsampwidth(2)
    out.setframerate(rate)
    out.writeframes(np.repeat(samples.astype("<i2"), channels).tobytes())
  return file.getvalue()


def record(index):
  return {
      "png": picture(index),
      "wav": sound(0.02 + 0.001 * index),
      "txt": f"number {index}",
      "json": json.dumps({"label": index, "words": {"en": f"no {index}"}}),
  }


def write_tar(path, rows):
  """A tar of (name, bytes) pairs, or of whole TarInfo objects."""
  with tarfile.open(path, "w") as tar:
    for row in rows:
      if isinstance(row, tarfile.TarInfo):
        tar.addfile(row)
        continue
      name, data = row
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return str(path)


def as_bytes(value):
  return value if isinstance(value, bytes) else value.encode()


def members(index, fields):
  return [(f"{index:04}.{k}", as_bytes(v)) for k, v in fields.items()]


def make(kind, folder, rows, shards=2):
  """Writes records, and opens what was written."""
  parts = [rows[k * len(rows) // shards : (k + 1) * len(rows) // shards]
           for k in range(shards)]
  if kind == "folder":
    for i, row in enumerate(rows):
      for name, data in members(i, row):
        path = folder / ("even", "odd")[i % 2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return sources.Folder(str(folder))
  if kind == "webdataset":
    start = 0
    for k, part in enumerate(parts):
      pairs = [m for i, row in enumerate(part) for m in members(start + i, row)]
      write_tar(folder / f"part-{k}.tar", pairs)
      start += len(part)
    return sources.WebDataset(f"{folder}/part-{{0..{shards - 1}}}.tar")
  if kind == "parquet":
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for k, part in enumerate(parts):
      names = {name: None for row in part for name in row}
      table = pa.table({n: [row.get(n) for row in part] for n in names})
      pq.write_table(
          table, folder / f"part-{k}.parquet", row_group_size=3,
          write_page_checksum=True,
      )
    return sources.Parquet(f"{folder}/part-*.parquet")
  if kind == "arrayrecord":
    for k, part in enumerate(parts):
      write_arrayrecord(folder / f"part-{k}.arrayrecord", part)
    return sources.ArrayRecord(f"{folder}/part-*.arrayrecord")
  write_tfds(folder, parts)
  return sources.TFDS(str(folder), "train")


def write_arrayrecord(path, rows):
  module = pytest.importorskip("array_record.python.array_record_module")
  writer = module.ArrayRecordWriter(str(path), "group_size:1")
  for row in rows:
    writer.write(tf_example.serialise(row))
  writer.close()


def write_tfds(folder, parts, form="array_record", splits=("train",)):
  """A prepared data set; every split has the same shards."""
  tfds = pytest.importorskip("tensorflow_datasets")
  bytes_feature = tfds.features.Tensor(shape=(), dtype=np.object_)
  infos = []
  for split in splits:
    for k, part in enumerate(parts):
      name = f"tiny-{split}.{form}-{k:05}-of-{len(parts):05}"
      if form == "array_record":
        write_arrayrecord(folder / name, part)
      else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [tf_example.serialise(row) for row in part]
        pq.write_table(pa.table({"data": rows}), folder / name)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name="tiny", split=split, filetype_suffix=form,
    )
    infos.append(
        tfds.core.SplitInfo(
            name=split, shard_lengths=[len(part) for part in parts],
            num_bytes=1, filename_template=template,
        )
    )
  names = dict.fromkeys(name for part in parts for row in part for name in row)
  features = {name: bytes_feature for name in names}
  features["png"] = tfds.features.Image(shape=(None, None, 3))
  features["txt"] = tfds.features.Text()
  tfds.folder_dataset.write_metadata(
      data_dir=os.fspath(folder), split_infos=infos, check_data=False,
      features=tfds.features.FeaturesDict(features),
  )
