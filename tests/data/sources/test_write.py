"""From every form into every form; whole or not at all."""

import os

import numpy as np
import pytest

from mmjax.data import sources
from mmjax.data.sources import stats, tf_example, write
from mmjax.data.sources.records import BadRecord
from tests.data.sources import files

COUNT = 7
FORMS = sorted(write.WRITERS)


class Rows:
  """Records of a list; None cannot be read."""

  def __init__(self, rows):
    self.rows = rows
    self.fields = tuple({name: 0 for row in rows if row for name in row})

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    if self.rows[index] is None:
      raise BadRecord("broken")
    return self.rows[index]

  def name(self, index):
    return f"row {index}"


def contents(records):
  """All fields of all records as bytes, without the sources' own keys."""
  return [
      {
          name: files.as_bytes(value)
          for name, value in records[i].items()
          if name not in ("__key__", "folder")
      }
      for i in range(len(records))
  ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", files.KINDS)
def test_every_form_becomes_every_other(kind, form, tmp_path):
  rows = [files.record(i) for i in range(COUNT)]
  del rows[2]["wav"]  # Records may lack fields, but for those of TFDS.
  if kind == "tfds":
    rows[2]["wav"] = b""
  (tmp_path / "in").mkdir()
  records = files.make(kind, tmp_path / "in", rows)
  out = str(tmp_path / "out")
  count, faults = write.convert(records, out, form, shard_size=3)
  assert (count, faults) == (COUNT, [])
  assert len(os.listdir(out)) == 3
  again = sources.open_records(out)
  assert contents(again) == contents(records)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_every_type(form, tmp_path):
  row = {
      "text": "grün", "whole": 3, "real": 0.5, "data": b"\xff\x00",
      "list": [1, 2, 3], "array": np.arange(6.0).reshape(2, 3),
      "inner": {"bytes": b"x", "n": 1}, "none": None,
  }
  write.convert(Rows([row, row]), str(tmp_path / "out"), form)
  found = sources.open_records(str(tmp_path / "out"))[0]
  assert sources.Text("text", Echo())(found) == "grün"
  assert sources.Label("whole")(found) == 3
  assert float(sources.fields.find(found, "real")) == 0.5
  assert found["data"] == b"\xff\x00"
  assert found["inner.bytes"] == b"x"
  assert "none" not in found
  array = sources.Numbers("array", (2, 3))(found)
  np.testing.assert_array_equal(array, row["array"])
  if form in ("parquet", "arrayrecord"):
    assert list(found["list"]) == [1, 2, 3]


class Echo:
  def encode(self, text):
    return text


@pytest.mark.parametrize("form", FORMS)
def test_records_that_cannot_be_read_are_left_out(form, tmp_path):
  rows = [files.record(0), None, files.record(2)]
  out = str(tmp_path / "out")
  assert write.convert(Rows(rows), out, form) == (2, ["row 1: broken"])
  assert len(sources.open_records(out)) == 2


def test_nothing_half_written_stays(tmp_path):
  out = tmp_path / "out"
  rows = [files.record(i) for i in range(6)]
  rows[5] = {"bad/../name": b"x"}
  with pytest.raises(ValueError, match="row 5: field 'bad/../name': expected"):
    write.convert(Rows(rows), str(out), "webdataset", shard_size=2)
  with pytest.raises(ValueError, match="none of the records can be read: row"):
    write.convert(Rows([None]), str(out), "folder")

  def interrupted(indices):
    yield from list(indices)[:3]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write.convert(Rows(rows[:5]), str(out), "folder", 1, interrupted)
  assert os.listdir(tmp_path) == []


def test_what_is_there_is_not_touched(tmp_path):
  (tmp_path / "file").write_text("mine")
  for name in ("", "file"):
    with pytest.raises(FileExistsError, match="exists; remove it"):
      write.convert(Rows([files.record(0)]), str(tmp_path / name), "folder")
  assert (tmp_path / "file").read_text() == "mine"
  with pytest.raises(ValueError, match="kind 'parket' .*did you mean 'parquet"):
    write.convert(Rows([files.record(0)]), str(tmp_path / "x"), "parket")
  with pytest.raises(ValueError, match="shard_size=0"):
    write.convert(Rows([files.record(0)]), str(tmp_path / "x"), "folder", 0)


def test_examples_of_tensorflow():
  """The bytes are those that TensorFlow would write and read."""
  row = {"a": b"xy", "n": [3, -1], "f": 1.5}
  # Field 1 of an entry is its key, 2 its value: of bytes in field 1 of it, of
  # floats in 2, of integers in 3.
  entry = lambda key, value: (
      b"\x0a" + bytes([len(value) + 5]) + b"\x0a\x01" + key
      + b"\x12" + bytes([len(value)]) + value
  )
  parts = (
      entry(b"a", b"\x0a\x04\x0a\x02xy")
      + entry(b"f", b"\x12\x06\x0a\x04\x00\x00\xc0\x3f")
      + entry(b"n", b"\x1a\x0d\x0a\x0b\x03" + b"\xff" * 9 + b"\x01")
  )
  data = b"\x0a" + bytes([len(parts)]) + parts
  assert tf_example.serialise(row) == data
  found = tf_example.parse(data)
  assert found["a"] == b"xy" and found["f"] == 1.5
  assert found["n"].tolist() == [3, -1]
  for bad in (b"\xff\xff\xff", b"\x0a\x80"):
    with pytest.raises(BadRecord, match="no tf.train.Example"):
      tf_example.parse(bad)
  with pytest.raises(BadRecord, match="'x': a list of unlike values"):
    tf_example.serialise({"x": [1, "a"]})


def test_stats(tmp_path):
  pytest.importorskip("soundfile")
  rows = [files.record(i) for i in range(4)]
  rows[1]["png"] = files.picture(1, "JPEG", (30, 20))
  rows[2]["png"] = rows[2]["png"][:20]
  del rows[3]["txt"]
  rows[3]["image"] = {"bytes": b"\xff\xfe", "path": None}
  records = Rows([*rows, None])
  found = stats.collect(records, range(5), sources.Limits())
  assert found["records"] == 5 and len(found["bad"]) == 2
  assert found["bad"][0].startswith("row 2: png: PNG: ")
  assert found["bad"][1] == "row 4: broken"
  png, wav, text = (found["fields"][name] for name in ("png", "wav", "txt"))
  assert png["kinds"] == {"PNG": 3, "JPEG": 1} and png["faults"] == 1
  assert png["width"] == dict(least=12, median=12, most=30)
  assert wav["seconds"]["total"] == pytest.approx(0.086)
  assert text["count"] == 3 and text["kinds"] == {"text": 3}
  assert text["bytes"] == dict(least=8, median=8, most=8, total=24)
  assert found["fields"]["json"]["kinds"] == {"JSON": 4}
  assert found["fields"]["image.bytes"]["kinds"] == {"bytes": 1}
  assert "image" not in found["fields"]
