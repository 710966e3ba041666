"""A picture shows the colours, places and heights that it was asked for."""

import numpy as np
import pytest

from mmjax.data.tinyworld import digits, render
from mmjax.data.tinyworld.digits import Dice

INKS = np.asarray(list(render.INKS.values())) / 127.5 - 1
GROUNDS = np.asarray(list(render.GROUNDS.values())) / 127.5 - 1


def drawn(index, colour=0, ground=0, centre=(0.5, 0.5), height=0.6, size=64):
  dice = Dice("render", index)
  canvas = render.background(size, ground, dice)
  glyph = digits.hand("test").glyphs[index]
  render.draw(canvas, glyph, colour, centre, height, 1.0, dice)
  return canvas


def ink_of(image, ground):
  """Which pixels differ from the ground by more than its noise."""
  distance = np.abs(image - GROUNDS[ground]).max(-1)
  return distance > 0.25


@pytest.mark.parametrize("ground", range(len(render.GROUNDS)))
def test_grounds_are_plain_but_not_flat(ground):
  image = render.background(32, ground, Dice("ground", ground))
  assert image.shape == (32, 32, 3) and image.dtype == np.float32
  np.testing.assert_allclose(image.mean((0, 1)), GROUNDS[ground], atol=0.01)
  assert 0.02 < image.std((0, 1)).min() < image.std((0, 1)).max() < 0.04


def test_two_grounds_have_other_noise():
  noises = {
      render.background(16, 0, Dice("noise", index)).tobytes()
      for index in range(50)
  }
  assert len(noises) == 50


@pytest.mark.parametrize("colour", range(len(render.INKS)))
@pytest.mark.parametrize("ground", range(len(render.GROUNDS)))
def test_ink_has_its_colour_and_stays_in_range(colour, ground):
  image = drawn(colour, colour, ground, height=0.8)
  assert np.abs(image).max() <= 1
  strongest = np.abs(image - GROUNDS[ground]).sum(-1).ravel().argsort()[-200:]
  ink = image.reshape(-1, 3)[strongest].mean(0)
  assert np.abs(INKS - ink).sum(-1).argmin() == colour


def test_every_ink_is_brighter_than_every_ground():
  assert INKS.sum(-1).min() > GROUNDS.sum(-1).max() + 0.5


def test_inks_are_far_apart():
  distance = np.linalg.norm(INKS[:, None] - INKS[None], axis=-1)
  assert distance[~np.eye(len(INKS), dtype=bool)].min() > 0.6


@pytest.mark.parametrize("size", [16, 32, 64, 224])
@pytest.mark.parametrize("height", [0.4, 0.75])
def test_digits_are_as_high_as_asked(size, height):
  found = []
  for index in range(20):
    rows = np.flatnonzero(
        ink_of(drawn(index, height=height, size=size), 0).any(1)
    )
    found.append((rows[-1] - rows[0] + 1) / size)
  assert np.mean(found) == pytest.approx(height, abs=0.05 + 1 / size)


@pytest.mark.parametrize("centre", [(0.3, 0.3), (0.7, 0.4), (0.5, 0.65)])
def test_digits_stand_where_asked(centre):
  found = []
  for index in range(30):
    y, x = np.nonzero(ink_of(drawn(index, centre=centre, height=0.4), 0))
    found.append(((x.min() + x.max() + 1) / 128, (y.min() + y.max() + 1) / 128))
  np.testing.assert_allclose(np.mean(found, 0), centre, atol=0.02)


def test_a_digit_at_the_edge_is_cut_not_moved():
  image = drawn(0, centre=(0.0, 0.5))
  ink = ink_of(image, 0)
  assert ink[:, 0].any() and not ink[:, 32:].any()


def test_sizes_agree_on_the_picture():
  small, large = drawn(3, size=32), drawn(3, size=64)
  pooled = large.reshape(32, 2, 32, 2, 3).mean((1, 3))
  assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.97


def drawn_plain(glyph, warp, index):
  """Ink of one glyph with no chance but that of the bend."""
  canvas = render.background(64, 0, Dice("plain"))
  dice = Dice("bend", index)
  render.draw(canvas, glyph, 0, (0.5, 0.5), 0.8, 0.0, dice, warp)
  return ink_of(canvas, 0)


def test_strokes_bend_but_stay():
  """A little bend moves a little ink; more moves more; none moves nothing."""
  glyphs = digits.hand("train").glyphs[:30]

  def moved(warp):
    pairs = [
        (drawn_plain(glyph, 0.0, i), drawn_plain(glyph, warp, i))
        for i, glyph in enumerate(glyphs)
    ]
    shared = sum((a & b).sum() for a, b in pairs)
    return 1 - shared / sum((a | b).sum() for a, b in pairs)

  assert moved(0.0) == 0
  assert 0.02 < moved(0.3) < moved(1.0) < 0.5
