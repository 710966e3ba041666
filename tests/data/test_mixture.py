"""The order of examples: shuffled, mixed, split, resumed."""

import collections
import contextlib
import itertools
import multiprocessing

import numpy as np
import pytest

from mmjax.data import mixture
from mmjax.data.mixture import Stream


class Numbers:
  """Examples that say who they are."""

  def __init__(self, start, length, key="label", dtype=np.int32):
    self.start, self.length, self.key, self.dtype = start, length, key, dtype

  def __len__(self):
    return self.length

  def __getitem__(self, i):
    assert 0 <= i < self.length
    return {self.key: self.dtype(self.start + i)}


def take(iterator, count):
  return [next(iterator)["label"].tolist() for _ in range(count)]


def make(*streams, **kwargs):
  streams = streams or (Stream(Numbers(0, 12)),)
  return mixture.batches(streams, **(dict(batch_size=4, seed=1) | kwargs))


def flat(rows):
  return list(itertools.chain.from_iterable(rows))


def test_an_epoch_has_every_example_once_and_its_own_order():
  iterator = make()
  first, second = flat(take(iterator, 3)), flat(take(iterator, 3))
  assert sorted(first) == sorted(second) == list(range(12))
  assert first != second and first != list(range(12))


def test_long_epochs_are_shuffled_without_a_table(monkeypatch):
  short = flat(take(make(), 6))
  monkeypatch.setattr(mixture, "_TABLE", 11)
  long = flat(take(make(), 6))
  assert long != short
  assert sorted(long[:12]) == sorted(long[12:]) == list(range(12))
  assert long[:12] != long[12:] != list(range(12))
  assert flat(take(make(start=3), 3)) == long[12:]


def test_the_seed_alone_decides():
  rows = take(make(), 6)
  assert take(make(threads=2), 6) == take(make(threads=0), 6) == rows
  assert take(make(seed=2), 6) != rows


def test_a_source_of_one_example_repeats_it():
  assert take(make(Stream(Numbers(5, 1))), 2) == [[5] * 4] * 2


def test_batches_may_span_epochs():
  rows = flat(take(make(Stream(Numbers(0, 6))), 3))
  assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_same_global_batches(count):
  streams = Stream(Numbers(0, 50), 3.0), Stream(Numbers(1000, 7))
  whole = take(make(*streams), 20)
  parts = [
      take(make(*streams, process_index=p, process_count=count), 20)
      for p in range(count)
  ]
  assert [flat(rows) for rows in zip(*parts)] == whole


def test_resume_continues_under_another_number_of_processes():
  iterator = make(threads=2)
  take(iterator, 2)
  state = iterator.get_state()
  rest = take(iterator, 5)
  parts = []
  for p in range(2):
    again = make(process_index=p, process_count=2)
    take(again, 1)
    again.set_state(state)
    parts.append(take(again, 5))
    assert again.get_state() == iterator.get_state()
  assert [flat(rows) for rows in zip(*parts)] == rest
  assert take(make(start=2), 5) == rest


def test_a_mixture_keeps_its_weights_at_every_point():
  rows = take(
      make(Stream(Numbers(0, 50), 3.0), Stream(Numbers(1000, 7), 1.0)), 50
  )
  for row in rows:
    assert sum(x >= 1000 for x in row) == 1
  small = collections.Counter(x for row in rows for x in row if x >= 1000)
  assert set(small) == set(range(1000, 1007))
  assert max(small.values()) - min(small.values()) <= 1


def test_uneven_weights_come_in_proportion():
  weights = (0.62, 0.25, 0.13)
  streams = [
      Stream(Numbers(1000 * k, 100), weight) for k, weight in enumerate(weights)
  ]
  seen = np.asarray(take(make(*streams, batch_size=100), 20)).ravel() // 1000
  shares = np.bincount(seen, minlength=3) / seen.size
  np.testing.assert_allclose(shares, weights, atol=2e-3)


def test_streams_of_one_source_do_not_follow_one_order():
  rows = take(make(Stream(Numbers(0, 64)), Stream(Numbers(100, 64))), 96)
  seen = flat(rows)
  first = [x for x in seen if x < 100]
  second = [x - 100 for x in seen if x >= 100]
  epochs = lambda xs: [xs[k : k + 64] for k in range(0, 192, 64)]
  for a, b in itertools.product(epochs(first), epochs(second)):
    assert sum(x == y for x, y in zip(a, b)) < 10


def test_a_transform_sees_every_example_of_its_stream():
  double = lambda e: {"label": np.int32(2 * e["label"] + 1)}
  rows = take(
      make(Stream(Numbers(0, 4), transform=double), Stream(Numbers(100, 4))), 2
  )
  seen = flat(rows)
  assert sorted(x for x in seen if x < 100) == [1, 3, 5, 7]
  assert sorted(x for x in seen if x >= 100) == [100, 101, 102, 103]


def test_evaluation_is_one_pass_in_order_with_marked_padding():
  rows = list(mixture.eval_batches(Numbers(0, 10), 4))
  assert [r["label"].tolist() for r in rows] == [
      [0, 1, 2, 3],
      [4, 5, 6, 7],
      [8, 9, 9, 9],
  ]
  assert [r["valid"].tolist() for r in rows] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
  assert rows[0]["valid"].dtype == np.float32


def test_evaluation_splits_among_processes_and_all_take_as_many_steps():
  whole = list(mixture.eval_batches(Numbers(0, 9), 4))
  parts = [list(mixture.eval_batches(Numbers(0, 9), 4, p, 2)) for p in range(2)]
  assert len(parts[0]) == len(parts[1]) == len(whole) == 3
  for key in ("label", "valid"):
    joined = [np.concatenate([a[key], b[key]]) for a, b in zip(*parts)]
    np.testing.assert_array_equal(joined, [row[key] for row in whole])
  assert parts[1][2]["valid"].tolist() == [0, 0]


ERRORS = (
    (dict(process_count=3), "batch_size=4 .* multiple of the 3 processes"),
    (dict(batch_size=0), "batch_size=0 is not a positive"),
    (dict(workers=-1), "workers=-1: expected at least 0"),
    (dict(process_index=2, process_count=2), "process_index=2 of .*=2"),
    (dict(streams=[]), "no streams"),
    (dict(streams=[Stream(Numbers(0, 0))]), r"stream 0 \(Numbers\): no examp"),
    (dict(streams=[Stream(Numbers(0, 3), 0.0)]), "weight 0.0 is not positive"),
    (dict(streams=[Stream(Numbers(0, 3), -1)]), "weight -1 is not positive"),
    (
        dict(
            streams=[
                Stream(Numbers(0, 3)),
                Stream(Numbers(0, 3, "identity")),
            ]
        ),
        "'label' differs: int32.* in stream 0 .*; missing in stream 1 ",
    ),
    (dict(streams=[Stream(Numbers(0, 3, "lable"))]), "nearest is 'label'"),
    (
        dict(streams=[Stream(Numbers(0, 3, "label", np.int64))]),
        r"stream 0 .*\n.*'label' must be i32\[B\], is i64",
    ),
)


@pytest.mark.parametrize("kwargs,message", ERRORS)
def test_bad_arguments(kwargs, message):
  streams = kwargs.pop("streams", (Stream(Numbers(0, 12)),))
  with pytest.raises(ValueError, match=message):
    mixture.batches(streams, **(dict(batch_size=4, seed=1) | kwargs))


def test_all_faults_come_in_one_message():
  with pytest.raises(ValueError) as error:
    make(Stream(Numbers(0, 0)), Stream(Numbers(0, 3), -1), process_count=3)
  message = str(error.value)
  assert "multiple of the 3 processes" in message
  assert "stream 0 (Numbers): no examples" in message
  assert "stream 1 (Numbers): weight -1" in message


def test_a_bad_evaluation_fails_before_its_first_batch():
  with pytest.raises(ValueError, match="no examples"):
    mixture.eval_batches(Numbers(0, 0), 4)
  with pytest.raises(ValueError, match="multiple of the 3 processes"):
    mixture.eval_batches(Numbers(0, 5), 4, 0, 3)


def test_workers_prepare_the_same_batches():
  streams = [Stream(Numbers(0, 10), 2.0), Stream(Numbers(100, 7))]
  alone = mixture.batches(streams, batch_size=4, seed=3, threads=0, start=2)
  helped = mixture.batches(streams, batch_size=4, seed=3, workers=2, start=2)
  with contextlib.closing(helped):
    assert take(helped, 5) == take(alone, 5)
    assert helped.get_state() == alone.get_state() == {"next_index": 7}
    for iterator in (alone, helped):
      iterator.set_state({"next_index": 3})
    assert take(helped, 3) == take(alone, 3)


def test_a_dead_worker_ends_the_reading():
  streams = [Stream(Numbers(0, 10))]
  batches = mixture.batches(streams, batch_size=4, seed=0, workers=1)
  with contextlib.closing(batches):
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match="(?i)worker"):
      take(batches, 50)
