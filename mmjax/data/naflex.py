"""How does a picture of any shape become a row of patches? (NaFlex)

SigLIP 2 (Tschannen et al. 2025, section 2.4.2): a picture keeps its proportions
and is resized so that its patches are as many as a row has room for.
"""

import math
from typing import Any

import numpy as np
from PIL import Image

from mmjax.data import transforms
from mmjax.data.batch import Example

# The released processors look for a scale between these, to this precision.
_LEAST, _MOST, _PRECISION = 1e-6, 100.0, 1e-5


def grid(height: int, width: int, patch: int, slots: int) -> tuple[int, int]:
  """Rows and columns of patches, at most `slots`, of a picture.

  Proportions are kept up to a patch: each side is rounded up to whole patches.
  The scale is sought by bisection, as in the released code, so that sizes are
  the same to the patch.

  Args:
    height: of the picture, pixels.
    width: likewise.
    patch: side of a patch, pixels.
    slots: most patches.

  Raises:
    ValueError: for a side that is not positive.
  """
  if min(height, width, patch, slots) < 1:
    raise ValueError(
        f"a picture of {height}x{width} in at most {slots} patches of {patch}: "
        "expected positive numbers"
    )
  # Rounded up; a side has one patch at least.
  cut = lambda scale: tuple(
      max(1, math.ceil(side * scale / patch)) for side in (height, width)
  )
  low, high = _LEAST, _MOST
  while high - low >= _PRECISION:
    middle = (low + high) / 2
    rows, columns = cut(middle)
    low, high = (middle, high) if rows * columns <= slots else (low, middle)
  return cut(low)


def patches(
    picture: Image.Image, patch: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
  """A picture as a row of patches, as `models.siglip2.NaFlex` takes it.

  Args:
    picture: of any mode and shape.
    patch: side P of a patch, pixels.
    slots: N, patches of a row.

  Returns:
    f32[N, P * P * 3] in [-1, 1], row-major, zeros behind the last patch, and
    i32[2], its rows and columns.
  """
  picture = picture.convert("RGB")
  rows, columns = grid(picture.height, picture.width, patch, slots)
  resized = picture.resize(
      (columns * patch, rows * patch), Image.Resampling.BILINEAR
  )
  pixels = transforms.HALF(np.asarray(resized))
  cut = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 1, 3, 4)
  found = np.zeros((slots, patch * patch * 3), np.float32)
  found[: rows * columns] = cut.reshape(rows * columns, -1)
  return found, np.array([rows, columns], np.int32)


class Patched:
  """Examples with `patches` and `grid` in the place of their `image`."""

  def __init__(self, source: Any, patch: int, slots: int) -> None:
    """Wraps a source.

    Args:
      source: examples with `image` f32[H, W, 3] in [-1, 1], of any shapes.
      patch: side of a patch, pixels.
      slots: patches of a row.
    """
    self._source = source
    self._patch = patch
    self._slots = slots

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Example:
    example = dict(self._source[index])
    pixels = (np.clip(example.pop("image"), -1, 1) + 1) * 127.5
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    row, shape = patches(picture, self._patch, self._slots)
    return example | {"patches": row, "grid": shape}
