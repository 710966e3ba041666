"""Whose handwriting does TinyWorld show, and where does its chance come from?

The 1,797 digits that ship inside scikit-learn were written by people who each
copied one fixed list of 130 digits, fourteen writers one after the other. The
list can be recognised in the labels, so the split falls between two writers:
the first three wrote the test digits, the others the training digits. (A
support vector machine reads the three to 0.974, and a held-out writer of the
fourteen to 0.970 on average: they are neither easy nor hard.) Chance is a hash
of the example's address, so an example is the same on every machine, in every
process and in any order of access.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import struct
from typing import Literal, TypeVar

import numpy as np
from PIL import Image
from sklearn import datasets

Split = Literal["train", "test"]
T = TypeVar("T")

# The fourth writer begins at row 386 of `sklearn.datasets.load_digits`.
TEST_COUNT = 386
TRAIN_COUNT = 1411

# A glyph is the 8x8 scan enlarged with an empty border, so that a warped
# stroke fades out before the picture ends.
SCAN = 8
BORDER = 2
ENLARGE = 4
GLYPH_SIDE = (SCAN + 2 * BORDER) * ENLARGE
GLYPH_HEIGHT = SCAN * ENLARGE


@dataclasses.dataclass(frozen=True)
class Hand:
  """The handwriting of one split.

  Attributes:
    rows: i64[n], rows of `sklearn.datasets.load_digits` (unique, increasing).
    labels: the n digits, as plain integers 0..9.
    glyphs: n grey pictures ("L", `GLYPH_SIDE` squared), ink is 255.
    of_digit: for every digit 0..9, the positions in `labels` that show it.
  """

  rows: np.ndarray
  labels: tuple[int, ...]
  glyphs: tuple[Image.Image, ...]
  of_digit: tuple[tuple[int, ...], ...]


@functools.cache
def hand(split: Split) -> Hand:
  """The handwriting of `split`: 1,411 digits to train, 386 to test.

  Raises:
    ValueError: if `split` is neither "train" nor "test".
  """
  if split not in ("train", "test"):
    raise ValueError(f"split={split!r}: expected 'train' or 'test'")
  rows = np.arange(TEST_COUNT + TRAIN_COUNT)
  rows = rows[:TEST_COUNT] if split == "test" else rows[TEST_COUNT:]
  data = datasets.load_digits()
  labels = data.target[rows]
  # The scans count ink in 4x4 blocks of a bitmap: 0..16.
  ink = (data.images[rows] * (255 / 16)).round().astype(np.uint8)
  ink = np.pad(ink, ((0, 0), (BORDER, BORDER), (BORDER, BORDER)))
  return Hand(
      rows=rows,
      labels=tuple(labels.tolist()),
      glyphs=tuple(_enlarge(scan) for scan in ink),
      of_digit=tuple(
          tuple(np.flatnonzero(labels == digit).tolist()) for digit in range(10)
      ),
  )


def _enlarge(scan: np.ndarray) -> Image.Image:
  size = (GLYPH_SIDE, GLYPH_SIDE)
  return Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC)


class Dice:
  """Independent draws that depend on nothing but the address of an example.

  They come from SHAKE-128 of the address: cheaper to set up than a generator
  of numpy, and fixed by a standard rather than by a library's version.
  """

  _DRAWS = 80
  _FORMAT = struct.Struct(f"<{_DRAWS}I")

  def __init__(self, *address: str | int) -> None:
    """`address`: for example the task, the split, the seed and the index."""
    digest = hashlib.shake_128(repr(address).encode())
    self._draws = iter(self._FORMAT.unpack(digest.digest(4 * self._DRAWS)))

  def between(self, low: float, high: float) -> float:
    """Uniform in `[low, high)`."""
    return low + (high - low) * next(self._draws) * 2.0**-32

  def below(self, count: int) -> int:
    """Uniform in `0 .. count - 1`."""
    return next(self._draws) * count >> 32

  def choose(self, options: Sequence[T]) -> T:
    """One of `options`, each as likely."""
    return options[next(self._draws) * len(options) >> 32]

  def sample(self, count: int, of: int) -> list[int]:
    """`count` different integers below `of`, in random order."""
    pool = list(range(of))
    return [pool.pop(self.below(len(pool))) for _ in range(count)]
