"""Marks of a mixture: which data set, and texts before their pictures."""

import numpy as np
import pytest

from mmjax.data import batch, interleaved


def row(seed=0):
  """Two documents, of two pictures and of one, and padding."""
  tokens = np.random.default_rng(seed).integers(1, 99, 12).astype(np.int32)
  return {
      "tokens": tokens,
      "segment": np.array([1] * 6 + [2] * 4 + [0] * 2, np.int32),
      "media": np.array(
          [-1, 0, 0, 1, 1, 1, -1, -1, 2, 2, -1, -1], np.int32
      ),
  }


def test_a_document_is_turned_to_its_own_next_picture():
  example = row()
  found = interleaved.Mark(kind=2, ahead=1.0)(example)
  np.testing.assert_array_equal(
      found["media"], [0, 1, 1, -1, -1, -1, 2, 2, -1, -1, -1, -1]
  )
  assert found["kind"] == 2 and found["kind"].dtype == np.int32
  assert found["media"].dtype == np.int32
  batch.check({k: v[None] for k, v in found.items()}, "a test")
  # What came in stays as it was.
  np.testing.assert_array_equal(example["media"], row()["media"])


def test_without_a_share_nothing_is_turned():
  found = interleaved.Mark(kind=0)(row())
  np.testing.assert_array_equal(found["media"], row()["media"])


def test_the_share_is_kept_and_the_choice_is_the_document_s():
  mark = interleaved.Mark(kind=0, ahead=0.3)
  turned = [mark(row(seed))["media"] for seed in range(400)]
  first = np.mean([media[0] == 0 for media in turned])
  second = np.mean([media[6] == 2 for media in turned])
  assert abs(first - 0.3) < 0.07 and abs(second - 0.3) < 0.07
  for seed in (0, 7):
    np.testing.assert_array_equal(mark(row(seed))["media"], turned[seed])


def test_what_cannot_be():
  with pytest.raises(ValueError, match="kind=-1, ahead=2"):
    interleaved.Mark(kind=-1, ahead=2)
