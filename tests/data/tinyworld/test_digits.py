"""Whose digits are whose, and chance that never changes."""

import numpy as np
import pytest
from sklearn import datasets

from mmjax.data.tinyworld import digits

# The list that every writer copied begins so.
COPIED = [*range(10)] * 3 + [0, 9, 5, 5, 6, 5, 0, 9, 8, 9]


def test_the_split_is_whole_and_disjoint():
  train, test = digits.hand("train"), digits.hand("test")
  assert not set(train.rows) & set(test.rows)
  assert sorted([*train.rows, *test.rows]) == list(range(1797))
  data = datasets.load_digits()
  for hand in (train, test):
    np.testing.assert_array_equal(hand.labels, data.target[hand.rows])
    assert len(hand.glyphs) == len(hand.rows)


def test_no_picture_is_in_both_splits():
  grey = lambda split: {g.tobytes() for g in digits.hand(split).glyphs}
  assert not grey("train") & grey("test")


def test_the_split_falls_between_two_writers():
  for split in ("train", "test"):
    assert list(digits.hand(split).labels[: len(COPIED)]) == COPIED


def test_glyphs_are_the_scans_enlarged():
  hand = digits.hand("test")
  scan = datasets.load_digits().images[hand.rows[3]] / 16
  ink = np.asarray(hand.glyphs[3], np.float32) / 255
  middle = ink.reshape(12, 4, 12, 4).mean((1, 3))[2:-2, 2:-2]
  assert np.corrcoef(scan.ravel(), middle.ravel())[0, 1] > 0.98
  assert ink[:4].max() == ink[-4:].max() == 0


def test_every_digit_lists_its_glyphs():
  for split in ("train", "test"):
    hand = digits.hand(split)
    for digit, positions in enumerate(hand.of_digit):
      assert {hand.labels[p] for p in positions} == {digit}
    assert sum(map(len, hand.of_digit)) == len(hand.labels)


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match="split='valid': expected 'train' or"):
    digits.hand("valid")


def test_dice_never_change():
  dice = digits.Dice("task", "train", 0, 7)
  assert [dice.below(1000) for _ in range(4)] == [27, 796, 292, 879]
  assert dice.between(0, 1) == pytest.approx(0.874492672, abs=1e-9)


def test_dice_of_other_addresses_are_others():
  first = lambda *address: digits.Dice(*address).below(2**32)
  addresses = [
      (task, split, seed, index)
      for task in ("a", "b")
      for split in ("train", "test")
      for seed in range(3)
      for index in range(100)
  ]
  assert len({first(*a) for a in addresses}) == len(addresses)
  assert first("a", 1, 12) != first("a", 11, 2)


def test_dice_are_fair():
  draws = np.asarray([digits.Dice("fair", i).below(6) for i in range(6000)])
  counts = np.bincount(draws, minlength=6)
  assert np.abs(counts - 1000).max() < 150
  values = [digits.Dice("fair", i).between(-1, 3) for i in range(2000)]
  assert -1 <= min(values) < -0.98 and 2.98 < max(values) < 3
  assert np.mean(values) == pytest.approx(1, abs=0.1)
  options = {digits.Dice("fair", i).choose("xyz") for i in range(50)}
  assert options == set("xyz")


def test_samples_are_without_repetition():
  for i in range(100):
    sample = digits.Dice("sample", i).sample(4, 5)
    assert len(set(sample)) == 4 and set(sample) <= set(range(5))
