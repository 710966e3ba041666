"""Kinds of data are guessed; what cannot be is refused; kinds' own errors."""

import pytest

from mmjax.data import sources
from mmjax.data.sources import guess, tf_example
from tests.data.sources import files

ROWS = [files.record(i) for i in range(4)]


@pytest.mark.parametrize("kind", files.KINDS)
def test_directories_are_guessed(kind, tmp_path):
  expected = files.make(kind, tmp_path, ROWS)
  split = "train" if kind == "tfds" else None
  found = guess.open_records(str(tmp_path), split)
  assert type(found) is type(expected) and len(found) == 4
  named = guess.open_records(f"{kind}:{tmp_path}", split)
  assert type(named) is type(expected)


def test_files_and_patterns_are_guessed(tmp_path):
  files.make("webdataset", tmp_path, ROWS)
  files.make("arrayrecord", tmp_path, ROWS)
  assert len(guess.open_records(f"{tmp_path}/part-1.tar")) == 2
  assert len(guess.open_records(f"{tmp_path}/part-{{0..1}}.tar")) == 4
  assert len(guess.open_records(f"{tmp_path}/*.arrayrecord")) == 4
  with pytest.raises(ValueError, match="holds arrayrecord and webdataset: say"):
    guess.open_records(str(tmp_path))
  assert len(guess.open_records(f"webdataset:{tmp_path}")) == 4


def test_what_cannot_be_guessed(tmp_path):
  (tmp_path / "x.bin").touch()
  for source, error, message in (
      (f"{tmp_path}/none", FileNotFoundError, "there is nothing at"),
      (f"{tmp_path}/x.bin", ValueError, "cannot tell its kind"),
      (f"tarr:{tmp_path}", ValueError, "'tarr' is not one of"),
      (f"parquet:{tmp_path}", ValueError, "no files that end in .parquet"),
      (f"{tmp_path}/*.tar", FileNotFoundError, "there are no such files"),
      (f"tfds:{tmp_path}", ValueError, "needs a split"),
  ):
    with pytest.raises(error, match=message):
      guess.open_records(source)
  with pytest.raises(ValueError, match="only TFDS directories have splits"):
    guess.open_records(str(tmp_path), "train")


def test_folders(tmp_path):
  (tmp_path / "cats").mkdir()
  for name in ("cats/a.JPG", "cats/a.txt", ".hidden.txt", "b.c.txt", "none"):
    (tmp_path / name).write_bytes(b"x")
  (tmp_path / ".git").mkdir()
  (tmp_path / ".git/a.txt").write_bytes(b"x")
  (tmp_path / "cats/self").symlink_to(tmp_path)
  (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
  found = sources.Folder(str(tmp_path))
  assert [found.name(i).removeprefix(f"{tmp_path}/") for i in range(3)] == [
      "b", "broken", "cats/a",
  ]
  assert found.fields == ("c.txt", "jpg", "txt", "folder")
  assert found[2] == {"folder": "cats", "jpg": b"x", "txt": b"x"}
  with pytest.raises(sources.BadRecord, match="no regular file"):
    found[1]
  assert len(sources.Folder(str(tmp_path), endings=["jpg"])) == 1
  with pytest.raises(ValueError, match="no files that end in wav .*there are"):
    sources.Folder(str(tmp_path), endings=["wav"])
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="no files below"):
    sources.Folder(str(tmp_path / "empty"))
  with pytest.raises(FileNotFoundError, match="expected a directory"):
    sources.Folder(str(tmp_path / "nothing"))


def test_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  rows = {"x": list(range(100)), "y": ["t"] * 99 + [None]}
  path = str(tmp_path / "a.parquet")
  pq.write_table(pa.table(rows), path, row_group_size=10)
  found = sources.Parquet(path, columns=["x"], cache_bytes=0)
  reads = []
  load = found._load
  found._load = lambda group: reads.append(group) or load(group)
  order = [55, 3, 51, 99, 7]
  assert found.read(order) == [{"x": i} for i in order]
  assert sorted(reads) == [0, 5, 9]
  assert len(found._cache) == 1
  whole = sources.Parquet(path)
  assert whole[98] == {"x": 98, "y": "t"} and whole[99] == {"x": 99}
  assert whole.name(37) == f"{path}:row 37"
  with pytest.raises(ValueError, match="no field 'z'"):
    sources.Parquet(path, columns=["z"])
  (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
  with pytest.raises(ValueError, match="cannot be read:\n.*b.parquet"):
    sources.Parquet(f"{tmp_path}/*.parquet")
  pq.write_table(pa.table({"x": pa.array([], pa.int64())}), path)
  with pytest.raises(ValueError, match="no rows in"):
    sources.Parquet(path)


def test_arrayrecord(tmp_path):
  files.make("arrayrecord", tmp_path, ROWS)
  path = f"{tmp_path}/part-0.arrayrecord"
  raw = sources.ArrayRecord(path, payload="bytes")
  assert tf_example.parse(raw[1]["data"])["txt"] == b"number 1"
  assert raw.name(1) == f"{path}:record 1"
  with pytest.raises(ValueError, match="payload='pickle': expected example or"):
    sources.ArrayRecord(path, payload="pickle")
  (tmp_path / "c.arrayrecord").write_bytes(b"none" * 99)
  (tmp_path / "d.arrayrecord").write_bytes(b"")
  with pytest.raises(ValueError, match="cannot be read:\n.*c.arr.*\n.*d.arr"):
    sources.ArrayRecord(f"{tmp_path}/*.arrayrecord")


@pytest.mark.parametrize("form", ["array_record", "parquet"])
def test_tfds_splits(form, tmp_path):
  rows = [files.record(i) for i in range(12)]
  parts = [rows[:5], rows[5:9], rows[9:]]
  files.write_tfds(tmp_path, parts, form, ("train", "test"))

  def numbers(split):
    found = sources.TFDS(str(tmp_path), split)
    return [int(r["txt"].split()[1]) for r in found.read(range(len(found)))]

  assert numbers("train") == numbers("test") == list(range(12))
  assert numbers("train[25%:75%]") == [3, 4, 5, 6, 7, 8]
  assert numbers("train[:2]+test[10:]") == [0, 1, 10, 11]
  for split, message in (
      ("trian", "no split 'trian'; did you mean 'train'.*; there are train, t"),
      ("train[", r"no split 'train\['"),
      ("train[:0]", "is empty"),
  ):
    with pytest.raises(ValueError, match=message):
      sources.TFDS(str(tmp_path), split)


def test_other_tfds_directories(tmp_path):
  files.write_tfds(tmp_path, [ROWS])
  with pytest.raises(ValueError, match="has no features.json: expected"):
    sources.TFDS(str(tmp_path.parent), "train")
  features = tmp_path / "features.json"
  text = features.read_text()
  foreign = text.replace("tensorflow_datasets.core.features.t", "os.t")
  features.write_text(foreign)
  with pytest.raises(ValueError, match="names 'os.*no feature of TFDS"):
    sources.TFDS(str(tmp_path), "train")
  # A feature that only TensorFlow can decode.
  audio = '{"pythonClassName": "tensorflow_datasets.core.features.audio_feature'
  audio += '.Audio", "audio": {"sampleRate": "8000", "shape": {"dimensions": '
  audio += '["-1"]}, "dtype": "int64", "encoding": "none"}}'
  features.write_text(
      text.replace('"features": {', f'"features": {{"sound": {audio},', 1)
  )
  with pytest.raises(ValueError, match="a feature that needs tensorflow"):
    sources.TFDS(str(tmp_path), "train")
