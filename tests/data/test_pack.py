"""Packing: nothing lost, nothing split, order kept, segments apart."""

import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mmjax.data import batch as batch_lib
from mmjax.data import mixture, pack


def document(number, count, sizes=()):
  """`count` tokens that say whose they are, the last ones pictures'."""
  rows = sum(sizes)
  source = np.full(count, -1, np.int32)
  media = np.full(count, -1, np.int32)
  if rows:
    source[1 : 1 + rows] = np.arange(rows)
    media[1:] = len(sizes) - 1
    media[1 : 1 + rows] = np.repeat(np.arange(len(sizes)), sizes)
  tokens = np.arange(count, dtype=np.int32) + 1000 * (number + 1)
  weight = np.full(count, 0.5 + number, np.float32)
  weight[0] = 0
  return pack.Document(tokens, weight, source, media, tuple(sizes))


class Source:
  """Documents of given lengths and pictures; a picture holds its address."""

  def __init__(self, counts, shown):
    self._documents = [
        document(i, n, (2,) * k) for i, (n, k) in enumerate(zip(counts, shown))
    ]

  def __len__(self):
    return len(self._documents)

  def document(self, index):
    return self._documents[index]

  def pictures(self, index):
    k = len(self._documents[index].sizes)
    values = 100.0 * (index + 1) + np.arange(k)
    return np.ones((k, 4, 4, 3), np.float32) * values[:, None, None, None]


LENGTH, SLOTS = 24, 3
SIZES = st.lists(
    st.integers(0, SLOTS).flatmap(
        lambda k: st.tuples(st.integers(2 * k + 1, LENGTH), st.just(k))
    ),
    min_size=1,
    max_size=40,
)


def test_a_row_by_hand():
  row = pack.row([document(0, 4, (2,)), document(1, 3), document(2, 5, (2, 1))],
                 length=14, pad_id=9)
  expected = {
      "tokens": [1000, 1001, 1002, 1003, 2000, 2001, 2002,
                 3000, 3001, 3002, 3003, 3004, 9, 9],
      "weight": [0, .5, .5, .5, 0, 1.5, 1.5, 0, 2.5, 2.5, 2.5, 2.5, 0, 0],
      "segment": [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 0, 0],
      "position": [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 0],
      "source": [-1, 0, 1, -1, -1, -1, -1, -1, 2, 3, 4, -1, -1, -1],
      "media": [-1, 0, 0, 0, -1, -1, -1, -1, 1, 1, 2, 2, -1, -1],
  }  # fmt: skip
  assert row.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(row[key], value, err_msg=key)
  batch_lib.check({k: v[None] for k, v in row.items()}, "row")
  with pytest.raises(ValueError, match="7 tokens do not fit length=6"):
    pack.row([document(0, 4), document(1, 3)], length=6)


@given(SIZES, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_split_or_mixed_up(sizes, window):
  source = Source(*zip(*sizes))
  rows = pack.Packed(source, LENGTH, SLOTS, window)
  seen = []
  for index in range(len(rows)):
    row, members = rows[index], rows.members(index)
    assert members == sorted(members)
    # All of one window, and windows in order.
    assert len({m // window for m in members}) == 1
    assert not seen or seen[-1] // window <= members[0] // window
    seen += members
    features = 2 * row["images"][:, 0, 0, 0].astype(int)
    for number, member in enumerate(members, 1):
      own = row["segment"] == number
      places = np.flatnonzero(own)
      expected = source.document(member)
      # Whole, in one piece, with its weights and positions.
      assert places[-1] - places[0] + 1 == len(places)
      np.testing.assert_array_equal(row["tokens"][own], expected.tokens)
      np.testing.assert_array_equal(row["weight"][own], expected.weight)
      np.testing.assert_array_equal(row["position"][own], range(len(places)))
      # What it shows are its own pictures.
      shown = row["source"][own]
      for place, local in zip(shown, expected.source):
        assert (place < 0) == (local < 0)
        if place >= 0:
          assert features[place // 2] == 2 * (100 * (member + 1) + local // 2)
          assert place % 2 == local % 2
      for place, local in zip(row["media"][own], expected.media):
        assert (place < 0) == (local < 0)
        if place >= 0:
          assert features[place] == 2 * (100 * (member + 1) + local)
    padding = row["segment"] == 0
    assert not row["weight"][padding].any()
    assert (row["source"][padding] == -1).all()
    assert padding.sum() == LENGTH - sum(sizes[m][0] for m in members)
  assert sorted(seen) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_packer_is_greedy_and_its_windows_independent(sizes, window):
  counts, shown = zip(*sizes)
  rows = pack.plan(counts, shown, LENGTH, SLOTS, window)
  # A document begins a row only where no earlier row of its window has room.
  for number, row in enumerate(rows):
    for earlier in rows[:number]:
      before = [m for m in earlier if m < row[0]]
      if earlier[0] // window == row[0] // window:
        assert (
            sum(counts[m] for m in before) + counts[row[0]] > LENGTH
            or sum(shown[m] for m in before) + shown[row[0]] > SLOTS
        )
  cut = window * (len(sizes) // window // 2)
  first = pack.plan(counts[:cut], shown[:cut], LENGTH, SLOTS, window)
  assert rows[: len(first)] == first


def test_rows_may_be_read_in_any_order_and_resumed():
  source = Source([5, 9, 7, 24, 3, 12, 11, 2], [0] * 8)
  rows = pack.Packed(source, LENGTH)
  assert [rows.members(i) for i in range(len(rows))] == [
      [0, 1, 2, 4], [3], [5, 6], [7],
  ]  # fmt: skip
  again = pickle.loads(pickle.dumps(rows))
  for index in (2, 0, 3, 1):
    for key, value in rows[index].items():
      np.testing.assert_array_equal(again[index][key], value)
  assert "images" not in rows[0]
  for index in (4, -1):
    with pytest.raises(IndexError, match=f"index {index} of 4 rows"):
      rows[index]
  # As a stream of a mixture, from its second batch on.
  streams = [mixture.Stream(rows)]
  whole = mixture.batches(streams, batch_size=2, seed=0)
  next(whole)
  resumed = mixture.batches(streams, batch_size=2, seed=0, start=1)
  expected, found = next(whole), next(resumed)
  np.testing.assert_array_equal(found["tokens"], expected["tokens"])


def test_known_sizes_spare_the_count():
  source = Source([5, 9, 7], [1, 0, 2])
  sizes = np.asarray([[5, 1], [9, 0], [7, 2]])
  known = pack.Packed(source, LENGTH, SLOTS, sizes=sizes)
  counted = pack.Packed(source, LENGTH, SLOTS)
  assert known.members(0) == counted.members(0) == [0, 1, 2]
  np.testing.assert_array_equal(known[0]["images"], counted[0]["images"])


def test_bad_arguments_are_refused():
  source = Source([5, 30, 7, 25], [1, 0, 2, 0])
  with pytest.raises(ValueError) as error:
    pack.Packed(source, LENGTH, slots=1)
  message = str(error.value)
  assert "3 documents fit no row of 24 tokens and 1 pictures" in message
  assert "document 1: 30 tokens, 0 pictures" in message
  assert "document 2: 7 tokens, 2 pictures" in message
  with pytest.raises(ValueError, match=r"sizes is \[1, 2\], expected \[4, 2\]"):
    pack.Packed(source, LENGTH, sizes=np.zeros((1, 2), int))
  with pytest.raises(ValueError, match="no documents; length=0"):
    pack.Packed(Source([], []), 0)


def test_joined_documents_are_one():
  make = lambda tokens, source, media, sizes: pack.Document(
      np.array(tokens, np.int32), np.ones(len(tokens), np.float32),
      np.array(source, np.int32), np.array(media, np.int32), sizes,
  )  # fmt: skip
  one = pack.joined([
      make([5, 6, 7], [0, 1, -1], [0, 0, 0], (2,)),
      make([8, 9], [-1, -1], [-1, -1], ()),
      make([4, 3], [-1, 0], [-1, 0], (1,)),
  ])
  assert one.tokens.tolist() == [5, 6, 7, 8, 9, 4, 3]
  assert one.source.tolist() == [0, 1, -1, -1, -1, -1, 2]
  assert one.media.tolist() == [0, 0, 0, -1, -1, -1, 1]
  assert one.sizes == (2, 1)


def test_filled_rows_hold_what_fits_of_their_share():
  source = Source([5, 4, 9, 2, 2, 8, 3, 3], [0] * 8)
  rows = pack.Filled(source, length=12, each=2)
  assert len(rows) == 4
  np.testing.assert_array_equal(
      rows[0]["segment"], [1] * 5 + [2] * 4 + [0] * 3
  )
  assert rows[1]["segment"].tolist() == [1] * 9 + [2] * 2 + [0]
  # The second of 8 does not fit behind 2, and is left.
  short = pack.Filled(source, length=8, each=4)
  assert short[1]["segment"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
  with pytest.raises(IndexError):
    rows[4]
  with pytest.raises(ValueError, match="does not fit length=4"):
    pack.Filled(source, length=4, each=1)[0]
  with pytest.raises(ValueError, match="each=9"):
    pack.Filled(source, length=8, each=9)


def test_filled_rows_show_the_pictures_of_what_fits():
  source = Source([5, 6, 9, 2], [1, 2, 2, 0])
  rows = pack.Filled(source, length=24, each=4, slots=4)
  (row,) = [rows[index] for index in range(len(rows))]
  # The third document would fit the tokens, but not the slots.
  assert row["segment"].tolist() == [1] * 5 + [2] * 6 + [0] * 13
  assert row["images"][:, 0, 0, 0].tolist() == [100.0, 200.0, 201.0, 0.0]
  with pytest.raises(ValueError, match="2 pictures .* slots=1"):
    pack.Filled(source, length=24, each=1, slots=1)[1]
