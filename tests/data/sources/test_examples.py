"""Examples out of records, and what becomes of the bad ones."""

import json
import pickle

import numpy as np
import pytest

from mmjax.data import mixture
from mmjax.data.sources import BadRecord, Examples, Label, quarantine
from mmjax.data.sources.quarantine import TooManyBad


class Numbered:
  """Record i is i; those in `bad` cannot be read."""

  fields = ("y",)

  def __init__(self, count, bad=()):
    self.count, self.bad, self.reads = count, frozenset(bad), []

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    self.reads.append(index)
    if index in self.bad:
      raise BadRecord("broken")
    return {"y": index}

  def read(self, indices):
    return [self[i] for i in indices]

  def name(self, index):
    return f"file:{index}"


def make(count=100, bad=(), **options):
  fields = dict(label=Label("y"))
  return Examples(Numbered(count, bad), fields, **options)


def labels(source):
  return [int(source[i]["label"]) for i in range(len(source))]


def test_fields_are_objects_or_config_nodes():
  node = dict(type="mmjax.data.sources:Label", field="y")
  source = Examples(Numbered(5), dict(label=node))
  assert labels(source) == list(range(5))
  assert source.read([3, 1]) == [{"label": 3}, {"label": 1}]
  with pytest.raises(ValueError, match="fields.label.fild: unknown key"):
    Examples(Numbered(5), dict(label=dict(node, fild="y")))
  with pytest.raises(ValueError, match="fields.label: the records have no fie"):
    Examples(Numbered(5), dict(label=Label("z")))
  with pytest.raises(ValueError, match="needs at least one key"):
    Examples(Numbered(5), {})
  with pytest.raises(ValueError, match="Numbered: no records"):
    make(0)
  with pytest.raises(ValueError, match="max_bad=2: expected a share"):
    make(max_bad=2)


def test_bad_records_are_replaced_alike_everywhere():
  bad = (3, 50, 51)
  found = labels(make(bad=bad, max_bad=0.1))
  for i in range(100):
    assert (found[i] == i) == (i not in bad)
  assert not set(found) & set(bad)
  # In another order, another process, and in one read.
  other = pickle.loads(pickle.dumps(make(bad=bad, max_bad=0.1)))
  again = [int(other[i]["label"]) for i in reversed(range(100))]
  assert again[::-1] == found
  together = make(bad=bad, max_bad=0.1).read(range(100))
  assert [int(e["label"]) for e in together] == found
  assert labels(make(bad=bad, max_bad=0.1, seed=1)) != found
  # What is known to be bad is not read again.
  other.records.reads.clear()
  labels(other)
  assert not set(other.records.reads) & set(bad)


def test_bad_records_are_listed_once(tmp_path):
  path = tmp_path / "new" / "bad.jsonl"
  for _ in range(2):  # As a run that is resumed would.
    labels(make(bad=(3, 50), max_bad=0.1, quarantine=str(path)))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert sorted(lines, key=lambda line: line["index"]) == [
      dict(index=3, record="file:3", reason="broken"),
      dict(index=50, record="file:50", reason="broken"),
  ]


def test_too_many_bad_records_stop_reading(tmp_path):
  path = str(tmp_path / "bad.jsonl")
  source = make(1000, range(0, 1000, 50), quarantine=path)  # 2 %.
  with pytest.raises(TooManyBad) as error:
    labels(source)
  message = str(error.value)
  assert message.startswith(
      "11 bad records of 1,000, more than max_bad=0.01 allows:\n"
      "  file:0: broken\n"
  )
  assert "and 6 more" in message and path in message
  assert len(source.quarantine) == 11
  # Of a long source only what has been read counts.
  source = make(10**6, range(0, 10**6, 50))
  with pytest.raises(TooManyBad, match="11 bad records of 1,000"):
    labels(source)
  assert len(labels(make(1000, range(0, 1000, 100)))) == 1000


def test_where_nearly_all_is_bad_no_time_is_lost():
  source = make(10**6, range(1, 10**6), max_bad=1.0)
  with pytest.raises(ValueError, match=r"record 5 \(file:5\) is bad, and 16 o"):
    source[5]


def test_other_errors_are_not_hidden():
  source = make()
  source.records.bad = None  # A fault of the program.
  with pytest.raises(TypeError):
    source[0]


def test_quarantines_of_sources_are_found():

  class Outer:
    def __init__(self, source):
      self.source = source

  source = make()
  assert quarantine.of([Outer(Outer(source)), object(), source]) == [
      source.quarantine, source.quarantine,
  ]


def test_the_mixture_stops_with_the_message():
  source = make(100, range(0, 100, 2), max_bad=0.1)
  rows = mixture.batches(
      [mixture.Stream(source)], batch_size=10, seed=0, threads=2
  )
  with pytest.raises(ValueError, match="1[1-4] bad records of 100, more t"):
    for _ in range(20):
      next(rows)


def test_counts_of_threads_add_up():
  bad = range(0, 64, 8)
  source = make(64, bad, max_bad=0.5)
  rows = mixture.batches(
      [mixture.Stream(source)], batch_size=8, seed=0, threads=4, prefetch=8
  )
  seen = np.concatenate([next(rows)["label"] for _ in range(24)])
  assert set(seen.tolist()) == set(range(64)) - set(bad)
  assert len(source.quarantine) == len(bad)
