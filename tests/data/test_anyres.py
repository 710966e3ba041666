"""Tiles: the best grid, what stands where, and examples with their rows."""

import numpy as np
from PIL import Image
import pytest

from mmjax.data import anyres, batch, subwords, templates
from mmjax.data.anyres import Grids

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
RELEASED = Grids(336, 14, PINPOINTS)
SMALL = Grids(8, 4, ((8, 16), (16, 8), (16, 16)))


@pytest.mark.parametrize(
    "size,grid",
    [
        # (height, width): by hand, effective pixels and then waste.
        ((300, 600), (336, 672)),
        ((600, 300), (672, 336)),
        ((1000, 1000), (672, 672)),
        ((100, 100), (336, 672)),  # All keep it whole; the first is smallest.
        ((2000, 500), (1008, 336)),
        ((336, 1008), (336, 1008)),
    ],
)
def test_the_best_grid(size, grid):
  assert RELEASED.best(*size) == grid


def test_how_many_rows_a_picture_has():
  # 24 x 24 whole, then lines of 48 with an end each.
  assert len(RELEASED.rows(672, 672)) == 576 + 48 * 49
  # Twice as wide as high on a 2:1 grid: nothing is cut.
  assert len(RELEASED.rows(300, 600)) == 576 + 24 * 49
  # 4:1 on (336, 1008): 252 of 336 pixels, 18 of 24 lines.
  assert len(RELEASED.rows(250, 1000)) == 576 + 18 * 73
  assert RELEASED.most == 5 and RELEASED.features == 576


def test_rows_follow_the_picture_line_by_line():
  # One picture behind another of three tiles: its first is tile 3.
  rows = SMALL.rows(8, 16, first=3, newline=99)
  whole = [12, 13, 14, 15]
  assert rows.tolist() == [
      *whole, 16, 17, 20, 21, 99, 18, 19, 22, 23, 99
  ]  # fmt: skip
  # Higher than its grid of 2 x 4 patches: the two columns in the middle.
  narrow = SMALL.rows(3, 4, newline=99)
  assert narrow.tolist() == [0, 1, 2, 3, 5, 8, 99, 7, 10, 99]


def test_tiles_hold_the_picture_where_the_rows_say():
  # A picture whose pixels tell their patch: nothing moves on a fitting grid.
  picture = np.zeros((8, 16, 3), np.uint8)
  for y in range(2):
    for x in range(4):
      picture[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 10 * (4 * y + x)
  tiles = SMALL.tiles(Image.fromarray(picture), lambda x: x.astype(np.float32))
  assert tiles.shape == (3, 8, 8, 3)
  patches = tiles.reshape(3, 2, 4, 2, 4, 3).swapaxes(2, 3).mean(axis=(3, 4, 5))
  rows = SMALL.rows(8, 16, newline=-1)[4:].reshape(2, 5)
  np.testing.assert_array_equal(
      patches.ravel()[rows[:, :4]], 10 * np.arange(8).reshape(2, 4)
  )
  assert (rows[:, 4] == -1).all()


class Talk:
  """Two pictures of different shapes an example."""

  shown = 2

  def __len__(self):
    return 1

  def conversation(self, index):
    return [("user", "<image>one<image>two"), ("assistant", "seven")]

  def pictures(self, index):
    return [np.full((8, 16, 3), -1.0), np.full((40, 10, 3), 1.0)]

  def answer(self, index):
    return "seven"


def test_examples_point_into_the_tiles_of_all_their_pictures():
  template = templates.load("vicuna", system="")
  formatter = templates.Formatter(subwords.load(), template, 64)
  source = anyres.Tiled(Talk(), formatter, SMALL)
  example = source[0]
  batch.check({k: v[None] for k, v in example.items()}, "tiled")
  newline = 2 * SMALL.most * SMALL.features
  first = SMALL.rows(8, 16, 0, newline)
  second = SMALL.rows(40, 10, 3, newline)
  placed = example["source"][example["source"] >= 0]
  np.testing.assert_array_equal(placed, [*first, *second])
  assert example["images"].shape == (10, 8, 8, 3)
  # Black tiles of the first, white of the second, empty slots.
  shown = example["images"].reshape(10, -1)
  assert (shown[:3] == -1).all() and shown[3:].max() == 1
  assert not shown[6:].any()
  prompt = source.prompt(0)
  assert prompt["weight"].sum() == 0
  assert (prompt["source"] >= 0).sum() == len(placed)
  assert source.question(0) == "onetwo" and source.answer(0) == "seven"


def test_grids_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match=r"\(8, 12\)"):
    Grids(8, 4, ((8, 8), (8, 12)))
  with pytest.raises(ValueError, match="patches of 3"):
    Grids(8, 3, ((8, 8),))

