"""Ink is where the picture has the digit's colour."""

import numpy as np

from mmjax.data.tinyworld import SegmentedDigits


def test_ink_is_where_the_digit_was_drawn():
  source = SegmentedDigits("test", size=32)
  for index in (0, 7, 123):
    image, ink = source[index]["image"], source.ink(index)
    assert image.shape == (32, 32, 3) and ink.shape == (32, 32)
    assert 0 <= ink.min() and ink.max() == 1 and (ink > 0.5).mean() < 0.5
    full, none = image[ink == 1], image[ink == 0]
    # One colour, and another, each up to a little noise.
    for pixels in (full, none):
      assert np.ptp(pixels, axis=0).max() < 0.15
    assert np.abs(full.mean(axis=0) - none.mean(axis=0)).max() > 0.3
    assert source[index]["label"] in range(10)


def test_the_splits_have_their_own_pictures():
  train, test = SegmentedDigits("train"), SegmentedDigits("test")
  assert (train[0]["image"] != test[0]["image"]).any()
  np.testing.assert_array_equal(test[3]["image"], test[3]["image"])
  np.testing.assert_array_equal(test.ink(3), test.ink(3))
