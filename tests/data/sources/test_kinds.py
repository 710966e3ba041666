"""What holds for every source of records."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from mmjax.data import mixture, sources
from mmjax.data.sources.records import BadRecord
from tests.data.sources import files

COUNT = 10


def grey(picture, size):
  return np.full((size, size, 3), np.asarray(picture)[0, 0, 0], np.float32)


def build(kind, folder, bad=(), **options):
  """Examples whose `image` and `label` say who they are."""
  rows = [files.record(i) for i in range(COUNT)]
  for i in bad:
    rows[i]["png"] = rows[i]["png"][:45]
  fields = dict(
      image=sources.Picture("png", 2, grey), label=sources.Label("json.label")
  )
  return sources.Examples(
      files.make(kind, folder, rows), fields, **dict(max_bad=0.5) | options
  )


@pytest.mark.parametrize("kind", files.KINDS)
def test_records_are_what_was_written(kind, tmp_path):
  rows = [files.record(i) for i in range(COUNT)]
  records = files.make(kind, tmp_path, rows)
  assert len(records) == COUNT
  assert {"png", "wav", "txt", "json"} <= set(records.fields)
  found = {i: records[i] for i in range(COUNT)}
  labels = [sources.Label("json.label")(found[i]) for i in range(COUNT)]
  assert sorted(labels) == list(range(COUNT))
  for i, label in enumerate(labels):
    for name, value in rows[label].items():
      assert files.as_bytes(found[i][name]) == files.as_bytes(value)
  # Several at once, repeated and out of order.
  order = [7, 2, 2, 9, 0]
  assert records.read(order) == [found[i] for i in order]
  assert len({records.name(i) for i in range(COUNT)}) == COUNT
  for index in (-1, COUNT):
    with pytest.raises(IndexError, match=f"index {index} of {COUNT} records"):
      records[index]


@pytest.mark.parametrize("kind", files.KINDS)
def test_no_example_is_lost_or_doubled_over_two_processes(kind, tmp_path):
  bad = (3, 8)
  source = build(kind, tmp_path, bad)
  seen = []
  for p in range(2):
    own = pickle.loads(pickle.dumps(source))  # As another process would have.
    rows = mixture.batches(
        [mixture.Stream(own)],
        batch_size=2, seed=5, process_index=p, process_count=2, threads=2,
    )
    for _ in range(COUNT // 2):
      batch = next(rows)
      shades = batch["image"][:, 0, 0, 0].astype(int)
      assert (shades == [files.shade(i) for i in batch["label"]]).all()
      seen += batch["label"].tolist()
  good = set(range(COUNT)) - set(bad)
  assert len(seen) == COUNT and set(seen) == good
  # Each bad one is replaced by one that its index decides.
  once = sorted(int(source[i]["label"]) for i in range(COUNT))
  assert sorted(seen) == once
  assert len(source.quarantine) == len(bad)


def test_other_processes_read_too(tmp_path):
  """With their files open here, as a forked or spawned worker gets them."""
  found = []
  for kind in files.KINDS:
    (tmp_path / kind).mkdir()
    records = files.make(kind, tmp_path / kind, [files.record(0)] * 4)
    records[3]
    fields = dict(image=sources.Picture("png", 2))
    found.append(sources.Examples(records, fields))
  program = (
      "import pickle, sys\n"
      "for source in pickle.load(sys.stdin.buffer):\n"
      "  print(len(source), source[3]['image'].shape)"
  )
  done = subprocess.run(
      [sys.executable, "-c", program], input=pickle.dumps(found),
      capture_output=True, check=True,
  )
  assert done.stdout.decode() == "4 (2, 2, 3)\n" * len(files.KINDS)


@pytest.mark.parametrize("kind", files.KINDS)
def test_many_threads_read_one_source(kind, tmp_path):
  source = build(kind, tmp_path)

  def labels(threads):
    rows = mixture.batches(
        [mixture.Stream(source)], batch_size=4, seed=0, threads=threads
    )
    return [next(rows)["label"].tolist() for _ in range(20)]

  assert labels(8) == labels(0)


def test_nothing_imports_tensorflow(tmp_path):
  build("tfds", tmp_path)[0]
  assert "tensorflow" not in sys.modules


def test_a_record_that_cannot_be_read_spoils_no_others(tmp_path):
  """Of Parquet it is the whole row group, of ArrayRecord one record."""
  rng = np.random.default_rng(0)
  rows = [{"data": rng.bytes(3000)} for i in range(9)]
  for kind, lost in (("parquet", 3), ("arrayrecord", 1)):
    folder = tmp_path / kind
    folder.mkdir()
    records = files.make(kind, folder, rows, shards=1)
    path = folder / f"part-0.{kind}"
    data = bytearray(path.read_bytes())
    data[data.index(rows[4]["data"][1000:1020])] ^= 1
    path.write_bytes(data)
    records = type(records)(str(path))
    good = []
    for i in range(9):
      try:
        good.append(records[i] == rows[i])
      except BadRecord:
        pass
    assert all(good) and len(good) == 9 - lost, kind
    with pytest.raises(BadRecord):
      records.read(range(9))
