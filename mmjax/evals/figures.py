"""Pictures of results, as arrays u8[H, W, 3] that the loop writes to files."""

from collections.abc import Sequence
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_RIGHT, _WRONG = (20, 130, 50), (190, 30, 30)


def to_uint8(image: np.ndarray) -> np.ndarray:
  """A picture f32[H, W, 3] in [-1, 1] as u8[H, W, 3]."""
  return ((np.clip(image, -1, 1) + 1) * 127.5).round().astype(np.uint8)


def captioned_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    right: Sequence[bool],
    columns: int = 4,
    side: int = 128,
) -> np.ndarray:
  """Pictures f32[H, W, 3] in a grid, each above its caption.

  Captions stand in green where `right`, else in red.
  """
  font = ImageFont.load_default(12)
  width, height = side + 32, side + 64
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * width, rows * height), _PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, (image, caption, ok) in enumerate(zip(images, captions, right)):
    x, y = i % columns * width + 16, i // columns * height + 8
    picture = Image.fromarray(to_uint8(image))
    sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
    text = "\n".join(textwrap.wrap(caption, 24))
    draw.text((x, y + side + 2), text, _RIGHT if ok else _WRONG, font)
  return np.asarray(sheet)


def confusion(
    label: np.ndarray, guess: np.ndarray, names: Sequence[str], cell: int = 34
) -> np.ndarray:
  """A confusion matrix: rows are the truth, columns the guess."""
  count = len(names)
  table = np.zeros((count, count), int)
  np.add.at(table, (label, guess), 1)
  share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
  font, margin = ImageFont.load_default(11), 60
  side = margin + count * cell
  sheet = Image.new("RGB", (side, side), _PAPER)
  draw = ImageDraw.Draw(sheet)
  for row in range(count):
    y = margin + row * cell
    draw.text((4, y + 10), names[row], _INK, font)
    draw.text((y + 3, margin - 18), names[row][:5], _INK, font)
    for column in range(count):
      x = margin + column * cell
      tone = int(255 * (1 - share[row, column]))
      draw.rectangle((x, y, x + cell - 1, y + cell - 1), (tone, tone, 255))
      if table[row, column]:
        ink = _PAPER if tone < 128 else _INK
        draw.text((x + 7, y + 10), str(table[row, column]), ink, font)
  return np.asarray(sheet)
