"""Relative positions: the paper's buckets, and the table they choose from."""

import math

import jax
import numpy as np
import pytest

from mmjax.nn import linear, partitioning
from mmjax.nn.relative_position import RelativePositions, bucket


def paper(distance, buckets, longest, sides):
  """One distance at a time, with real logarithms (Raffel et al. 2020)."""
  begin = 0
  if sides == "both":
    buckets //= 2
    begin = buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = buckets // 2
  if distance < exact:
    return begin + distance
  share = math.log(distance / exact) / math.log(longest / exact)
  # A border is a power of two here; the sum keeps rounding off it.
  return begin + min(
      exact + int(share * (buckets - exact) + 1e-6), buckets - 1
  )


@pytest.mark.parametrize("sides", ["both", "past"])
@pytest.mark.parametrize("buckets,longest", [(32, 128), (16, 64), (8, 10)])
def test_buckets_are_those_of_the_paper(buckets, longest, sides):
  distance = np.arange(-300, 300)
  found = bucket(distance, buckets, longest, sides)
  expected = [paper(int(d), buckets, longest, sides) for d in distance]
  np.testing.assert_array_equal(found, expected)


def test_known_buckets():
  past = lambda *d: bucket(-np.array(d), 32, 128, "past").tolist()
  assert past(0, 1, 15, 16, 18, 19, 127, 128, 10**6) == [
      0, 1, 15, 16, 16, 17, 31, 31, 31,
  ]
  assert bucket(np.array([1, 5]), 32, 128, "past").tolist() == [0, 0]
  both = bucket(np.array([-128, -8, 0, 8, 128]), 32, 128, "both")
  assert both.tolist() == [15, 8, 0, 24, 31]


@pytest.mark.parametrize("sides", ["both", "past"])
def test_a_head_reads_its_column_of_the_table(sides):
  system = RelativePositions(3, 8, 10, sides, linear.normal(1.0))
  query = np.array([[4, 5], [90, 91]], np.int32)
  key = np.arange(40, dtype=np.int32)[None]
  found, variables = system.init_with_output(jax.random.key(0), query, key)
  table = partitioning.unbox(variables)["params"]["table"]
  assert found.shape == (2, 3, 2, 40)
  distance = key[:, None] - query[:, :, None]
  expected = np.asarray(table)[bucket(distance, 8, 10, sides)]
  np.testing.assert_array_equal(found, expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "buckets,longest,sides,message",
    [
        (8, 10, "left", "sides 'left' is not one of"),
        (2, 10, "both", "at least 4 buckets"),
        (32, 8, "both", "a distance above 8"),
    ],
)
def test_what_cannot_be_is_refused(buckets, longest, sides, message):
  system = RelativePositions(1, buckets, longest, sides, linear.normal(1.0))
  place = np.zeros((1, 1), np.int32)
  with pytest.raises(ValueError, match=message):
    system.init(jax.random.key(0), place, place)
