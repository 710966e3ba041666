"""Draws the pictures of masks.md: `python docs/draw_masks.py`.

A picture shows the `mask` that the code block above it makes, so that code and
picture cannot disagree. Queries run down, keys to the right; black is visible.
"""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmjax.nn import mask as masks

HERE = pathlib.Path(__file__).parent
# A code block, and the picture below it.
BLOCK = re.compile(r"```python\n([^`]*)```\n+!\[[^\]]*\]\(([^)]*)\)")

# Pixels from cell to cell, and shades of grey.
CELL = 8
VISIBLE, HIDDEN, GRID = 0, 255, 208


def masks_of(text: str) -> dict[str, masks.Mask]:
  """The masks that a page shows, by the path of their pictures."""
  shown = {}
  for code, path in BLOCK.findall(text):
    names = {"jnp": jnp, "np": np, "masks": masks}
    exec(code, names)
    shown[path] = names["mask"]
  return shown


def draw(mask: masks.Mask) -> np.ndarray:
  """The first mask of a batch as u8[8 Q + 1, 8 K + 1] shades of grey."""
  visible = np.asarray(mask.dense())[0]
  queries, keys = visible.shape
  picture = np.full((queries * CELL + 1, keys * CELL + 1), GRID, np.uint8)
  shades = np.where(visible, VISIBLE, HIDDEN)
  for row in range(1, CELL):
    for column in range(1, CELL):
      picture[row::CELL, column::CELL] = shades
  return picture


def main() -> None:
  """Writes every picture next to the page."""
  for path, mask in masks_of((HERE / "masks.md").read_text()).items():
    Image.fromarray(draw(mask)).save(HERE / path, optimize=True)
    print(path)


if __name__ == "__main__":
  main()
