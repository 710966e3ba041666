"""How does a TinyWorld picture come from the attributes of its digits?

One digit is a warped glyph, cut softly at a threshold that sets the width of
the stroke, and blended in its colour over a plain, slightly noisy background.
Everything is float32 in [-1, 1]; places and heights are fractions of the side.
"""

import functools
import hashlib
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.data.tinyworld import digits
from mmjax.data.tinyworld.digits import Dice

RGB = tuple[int, int, int]

# Far apart in hue or lightness, and every ink brighter than every ground: a
# network of a few layers learns the shapes much sooner when ink has one sign.
INKS: dict[str, RGB] = {
    "red": (236, 44, 44),
    "orange": (248, 142, 24),
    "yellow": (246, 230, 50),
    "green": (52, 186, 66),
    "cyan": (40, 214, 224),
    "blue": (66, 110, 248),
    "purple": (170, 76, 216),
    "pink": (248, 150, 204),
}
GROUNDS: dict[str, RGB] = {
    "black": (14, 14, 16),
    "grey": (66, 66, 70),
    "navy": (16, 24, 84),
    "brown": (78, 44, 20),
}

# Colours stay this far from the ends of [-1, 1], so that noise needs no clip.
_NOISE = 0.05
_NOISE_SIDE = 1088

# Sides of pictures in pixels: on smaller ones digits cannot be told apart.
SMALLEST = 16
LARGEST = 1024

# How far the ink threshold moves, from bold to fine, as a share of full ink.
_STROKES = np.linspace(0.3, 0.5, 16)
_SOFTNESS = 0.4

# How much a hand varies: rotation in degrees, shear, width, and the change of
# scale towards the edges of the digit.
_ROTATION = 5.0
_SLANT = 0.08
_WIDTH = 0.08
_TILT = 0.06

# Cells to a side of the net that bends strokes (elastic distortion, Simard et
# al. 2003).
_CELLS = 3


def _colours(table: dict[str, RGB]) -> np.ndarray:
  return np.asarray(list(table.values()), np.float32) / 127.5 - 1.0


_INK_VALUES = _colours(INKS)
_GROUND_VALUES = _colours(GROUNDS)


def background(size: int, ground: int, dice: Dice) -> np.ndarray:
  """A plain, slightly noisy ground: f32[size, size, 3].

  Args:
    size: the side in pixels.
    ground: index into `GROUNDS`.
    dice: chooses the window of the noise.
  """
  top = dice.below(_NOISE_SIDE - size + 1)
  left = dice.below(_NOISE_SIDE - size + 1)
  noise = _noise()[top : top + size, left : left + size]
  return noise + _GROUND_VALUES[ground]


class Pose(NamedTuple):
  """Where and how a glyph stands in a picture: what chance decided.

  Attributes:
    window: rows and columns of the picture around the digit; only they are
      warped, since most of a picture is ground.
    mesh: bends strokes, None for not at all.
    perspective: eight numbers that map a pixel of the window to the glyph.
    stroke: how bold it is, an index into `_STROKES`.
    linear: four numbers of `perspective` without its vanishing lines.
  """

  window: tuple[slice, slice]
  mesh: list[Any] | None
  perspective: tuple[float, ...]
  stroke: int
  linear: tuple[float, float, float, float]

  def warp(self, glyph: Image.Image) -> np.ndarray:
    """A grey layer of the glyph as it lies in the window: u8[h, w]."""
    if self.mesh is not None:
      glyph = glyph.transform(
          glyph.size,
          Image.Transform.MESH,
          self.mesh,
          Image.Resampling.BILINEAR,
      )
    rows, columns = self.window
    return np.asarray(
        glyph.transform(
            (columns.stop - columns.start, rows.stop - rows.start),
            Image.Transform.PERSPECTIVE,
            self.perspective,
            Image.Resampling.BILINEAR,
        )
    )

  def turn(self, directions: np.ndarray) -> np.ndarray:
    """Directions f64[..., 2] in the glyph as they are in the picture.

    In pixels of each; perspective and bent strokes are left out.
    """
    a, b, d, e = self.linear
    return directions @ np.array([[e, -d], [-b, a]]) / (a * e - b * d)

  def ink(self, glyph: Image.Image) -> np.ndarray:
    """How far ink covers the window: f32[h, w, 1] in [0, 1]."""
    return _ink_tables()[self.stroke][self.warp(glyph)]


def place(
    size: int,
    centre: tuple[float, float],
    height: float,
    variety: float,
    dice: Dice,
    warp: float = 0.0,
) -> Pose:
  """How one digit will stand in a picture.

  Args:
    size: side of the picture, in pixels.
    centre: x and y of the digit's middle, as fractions of the side.
    height: height of the digit, as a fraction of the side.
    variety: how far the hand strays, 1 being the ranges above.
    dice: rotation, slant, width, perspective and stroke come from here.
    warp: how far strokes are bent, in pixels of the scan; 0 for not at all.
  """
  stray = lambda limit: variety * dice.between(-limit, limit)
  angle, slant = math.radians(stray(_ROTATION)), stray(_SLANT)
  width = 1.0 + stray(_WIDTH)
  tilt_x, tilt_y = stray(_TILT), stray(_TILT)
  stroke = dice.below(len(_STROKES))
  mesh = _bend(warp * digits.ENLARGE, dice) if warp else None
  reach = 0.5 * height * digits.GLYPH_SIDE / digits.GLYPH_HEIGHT * size
  left, right = _window(centre[0] * size, reach, size)
  top, bottom = _window(centre[1] * size, reach, size)
  zoom = digits.GLYPH_HEIGHT / (height * size)
  cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
  # The inverse map: where in the glyph does a pixel of the canvas come from?
  a, b = (cos + slant * sin) / width, (sin - slant * cos) / width
  d, e = -sin, cos
  linear = a, b, d, e
  x, y = centre[0] * size - left, centre[1] * size - top
  # In perspective, with the digit's middle where it is: both coordinates are
  # divided by 1 + g (x' - x) + h (y' - y).
  g, h = tilt_x / reach, tilt_y / reach
  middle = digits.GLYPH_SIDE / 2
  a, b, d, e = a + middle * g, b + middle * h, d + middle * g, e + middle * h
  one = 1.0 - g * x - h * y
  rows = (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y, g, h)
  return Pose(
      (slice(top, bottom), slice(left, right)),
      mesh,
      tuple(value / one for value in rows),
      stroke,
      linear,
  )


def draw(
    canvas: np.ndarray,
    glyph: Image.Image,
    colour: int,
    centre: tuple[float, float],
    height: float,
    variety: float,
    dice: Dice,
    warp: float = 0.0,
) -> tuple[Pose, np.ndarray]:
  """Draws one digit onto `canvas`, in place.

  Args:
    canvas: f32[S, S, 3] in [-1, 1].
    glyph: one of `digits.Hand.glyphs`.
    colour: index into `INKS`.
    centre: see `place`, like the others.
    height: see there.
    variety: see there.
    dice: see there.
    warp: see there.

  Returns:
    How the digit stands, and its `Pose.ink`.
  """
  pose = place(canvas.shape[0], centre, height, variety, dice, warp)
  region, ink = canvas[pose.window], pose.ink(glyph)
  region += ink * (_INK_VALUES[colour] - region)
  return pose, ink


def _bend(reach: float, dice: Dice) -> list[Any]:
  """A mesh that moves the knots of a net over the glyph, and what is between.

  Args:
    reach: how far a knot moves in x and in y at most, in pixels of the glyph.
    dice: takes two draws a knot.
  """
  side = digits.GLYPH_SIDE // _CELLS
  knots = [
      [
          (
              side * x + dice.between(-reach, reach),
              side * y + dice.between(-reach, reach),
          )
          for x in range(_CELLS + 1)
      ]
      for y in range(_CELLS + 1)
  ]
  mesh = []
  for y, (above, below) in enumerate(itertools.pairwise(knots)):
    for x in range(_CELLS):
      box = side * x, side * y, side * (x + 1), side * (y + 1)
      corners = above[x], below[x], below[x + 1], above[x + 1]
      mesh.append((box, tuple(itertools.chain(*corners))))
  return mesh


def _window(centre: float, reach: float, size: int) -> tuple[int, int]:
  low = max(0, math.floor(centre - reach))
  return low, min(size, math.ceil(centre + reach))


@functools.cache
def _noise() -> np.ndarray:
  """A fixed field of uniform noise, f32[side, side, 3]."""
  shape = (_NOISE_SIDE, _NOISE_SIDE, 3)
  data = hashlib.shake_128(b"tinyworld noise").digest(math.prod(shape))
  values = np.frombuffer(data, np.uint8).reshape(shape).astype(np.float32)
  return (values / 127.5 - 1.0) * np.float32(_NOISE)


@functools.cache
def _ink_tables() -> np.ndarray:
  """Opacity for every grey of a glyph, one row a stroke: f32[16, 256, 1]."""
  ink = np.linspace(0.0, 1.0, 256)
  rise = (ink - _STROKES[:, None]) / _SOFTNESS + 0.5
  # Fully clear ground must stay clear, however bold the stroke.
  return np.clip(rise, 0.0, 1.0).astype(np.float32)[..., None]
