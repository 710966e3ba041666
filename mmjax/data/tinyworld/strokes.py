"""How was a digit written? A pen's path through the middle of its ink.

A scan does not tell the order of its strokes, so it is made up as a hand would
do it: the ink is thinned to a line, which is walked from its uppermost end, as
straight as possible at crossings, and the pen is lifted for what is left over.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

from mmjax.data.tinyworld import digits
from mmjax.data.tinyworld.digits import Split

# Ink, of 255, that is thinned.
_INK = 100
# Leftovers of the thinning that are shorter are not written, in pixels.
_SHORTEST = 4
# The pen is lifted for a longer way to the next unwritten pixel.
_LIFT = 3.0
# Steps that the direction of the pen is the mean of.
_MEMORY = 5
# Where the pen goes first, if it can: to the left and down, as for an 0; like
# every place and direction in a scan as (row, column).
_FIRST = (0.5, -1.0)

# The eight neighbours in turn, as (row, column).
_RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))

_Pixel = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Path:
  """The way of the pen.

  Attributes:
    points: f64[n, 2], x and y in pixels of the glyph, about one apart.
    down: bool[n], whether the pen touches the paper.
    time: f64[n], when it is there, from 0 to 1.
  """

  points: np.ndarray
  down: np.ndarray
  time: np.ndarray

  def at(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the pen is: f64[..., 2], and whether it is down, in [0, 1]."""
    x, y, down = (
        np.interp(time, self.time, column)
        for column in (*self.points.T, self.down.astype(np.float64))
    )
    return np.stack([x, y], axis=-1), down


@functools.lru_cache(maxsize=digits.TEST_COUNT + digits.TRAIN_COUNT)
def path(split: Split, position: int) -> Path:
  """How the digit at a position of the split's `Hand` was written."""
  strokes = _walk(thin(np.asarray(digits.hand(split).glyphs[position]) > _INK))
  points, down = [], []
  for number, stroke in enumerate(strokes):
    line = _smooth(np.asarray(stroke, np.float64)[:, ::-1] + 0.5)
    if number and np.hypot(*(line[0] - points[-1][-1])) > _LIFT:
      points.append(np.linspace(points[-1][-1], line[0], len(line) // 3 + 4))
      down.append(np.zeros(len(points[-1]), bool))
    points.append(line)
    down.append(np.ones(len(line), bool))
  joined = np.concatenate(points)
  return Path(joined, np.concatenate(down), _timing(joined))


@functools.lru_cache(maxsize=digits.TEST_COUNT + digits.TRAIN_COUNT)
def age(split: Split, position: int) -> Image.Image:
  """How long ago a place was written: a grey layer, 255 at the very end.

  Between strokes it says when the nearest one was written.
  """
  way = path(split, position)
  side = np.arange(digits.GLYPH_SIDE) + 0.5
  points, time = way.points[way.down], way.time[way.down]
  across = (side[:, None] - points[:, 0]) ** 2
  along = (side[:, None] - points[:, 1]) ** 2
  nearest = (along[:, None] + across[None]).argmin(axis=-1)
  return Image.fromarray((255 * time[nearest]).round().astype(np.uint8))


def thin(ink: np.ndarray) -> np.ndarray:
  """The middle line of bool[H, W], one pixel wide (Zhang and Suen 1984)."""
  height, width = ink.shape
  ink = ink.copy()
  while True:
    before = ink.sum()
    for sides in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
      padded = np.pad(ink, 1)
      ring = np.stack([
          padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
          for y, x in _RING
      ])
      count = ring.sum(axis=0)
      rises = (ring[[1, 2, 3, 4, 5, 6, 7, 0]] > ring).sum(axis=0)
      border = (count >= 2) & (count <= 6) & (rises == 1)
      for side in sides:
        border &= ~ring[list(side)].all(axis=0)
      ink &= ~border
    if ink.sum() == before:
      return ink


def _walk(line: np.ndarray) -> list[list[_Pixel]]:
  """The strokes through all pixels of a thin line, in order."""
  left = {(int(row), int(column)) for row, column in np.argwhere(line)}
  ends = [pixel for pixel in left if len(_neighbours(pixel, left)) < 2]
  start = min(ends or left)
  strokes: list[list[_Pixel]] = []
  heading = _FIRST
  while left:
    if strokes:
      last = strokes[-1][-1]
      start = min(left, key=lambda p: (math.dist(p, last), p))
    stroke = [start]
    left.discard(start)
    while options := _neighbours(stroke[-1], left):
      if len(stroke) > 1:
        back = stroke[max(0, len(stroke) - 1 - _MEMORY)]
        heading = stroke[-1][0] - back[0], stroke[-1][1] - back[1]
      stroke.append(max(options, key=lambda p: _along(stroke[-1], p, heading)))
      left.discard(stroke[-1])
    if len(stroke) >= _SHORTEST or not strokes:
      strokes.append(stroke)
  return strokes


def _neighbours(pixel: _Pixel, among: set[_Pixel]) -> list[_Pixel]:
  found = ((pixel[0] + y, pixel[1] + x) for y, x in _RING)
  return [other for other in found if other in among]


def _along(here: _Pixel, there: _Pixel, heading: tuple[float, float]) -> float:
  """The cosine between a step and the heading, times the heading's length."""
  row, column = there[0] - here[0], there[1] - here[1]
  return (row * heading[0] + column * heading[1]) / math.hypot(row, column)


def _smooth(line: np.ndarray) -> np.ndarray:
  """The mean of neighbouring points; the ends stay where they are."""
  padded = np.pad(line, ((2, 2), (0, 0)), "edge")
  return sum(padded[i : i + len(line)] for i in range(5)) / 5


def _timing(points: np.ndarray) -> np.ndarray:
  """When the pen passes each point: slower in bends, at rest at both ends."""
  steps = np.diff(points, axis=0)
  heading = np.unwrap(np.arctan2(steps[:, 1], steps[:, 0]))
  bend = np.abs(np.diff(heading, append=heading[-1:]))
  effort = np.cumsum(np.hypot(*steps.T) * (1.0 + bend))
  done = np.concatenate([[0.0], effort / effort[-1]])
  clock = np.linspace(0.0, 1.0, 101)
  return np.interp(done, clock**2 * (3.0 - 2.0 * clock), clock)
