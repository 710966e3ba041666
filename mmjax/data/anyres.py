"""How is a picture of any shape seen by a tower of one shape? In tiles.

LLaVA-NeXT (Liu et al. 2024) lays a picture on the grid of tiles that keeps most
of it, and shows it whole besides. The rows of features that border strips gave
are left out again, and a row of its own ends every line. Which row of features
stands where is decided here, on the host.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Protocol

import numpy as np
from PIL import Image

from mmjax.data import transforms
from mmjax.data.batch import Example
from mmjax.data.conversations import last_question
from mmjax.data.templates import Conversation, Formatter


@dataclasses.dataclass(frozen=True)
class Grids:
  """Which grids of tiles there are.

  Attributes:
    side: of a tile, in pixels.
    patch: side of a patch.
    pinpoints: (height, width) of each grid, in pixels.
  """

  side: int
  patch: int
  pinpoints: Sequence[tuple[int, int]]

  def __post_init__(self) -> None:
    wrong = [
        tuple(shape)
        for shape in self.pinpoints
        if any(length < 1 or length % self.side for length in shape)
    ]
    if wrong or not self.pinpoints or self.side % self.patch:
      raise ValueError(
          f"grids {wrong or tuple(self.pinpoints)} of tiles of {self.side} "
          f"pixels with patches of {self.patch}: expected at least one, each "
          "(height, width) in whole tiles of whole patches"
      )

  @property
  def most(self) -> int:
    """Tiles of the largest grid, and the whole picture."""
    return 1 + max(self.count(shape) for shape in self.pinpoints)

  @property
  def features(self) -> int:
    """Patches of one tile."""
    return (self.side // self.patch) ** 2

  def best(self, height: int, width: int) -> tuple[int, int]:
    """The grid on which most of a picture is seen, and least is wasted."""

    def seen(shape: tuple[int, int]) -> int:
      scale = min(shape[1] / width, shape[0] / height)
      return min(int(width * scale) * int(height * scale), width * height)

    # Of equal ones the smallest, of those the first.
    found = max(self.pinpoints, key=lambda s: (seen(s), -s[0] * s[1]))
    return found[0], found[1]

  def tiles(
      self,
      picture: Image.Image,
      normalise: Callable[[np.ndarray], np.ndarray] = transforms.CLIP,
  ) -> np.ndarray:
    """The whole picture, squeezed into a tile, and then the tiles of its grid.

    Args:
      picture: of any mode and shape.
      normalise: u8[..., 3] to f32[..., 3].

    Returns:
      f32[1 + tiles, side, side, 3].
    """
    picture = picture.convert("RGB")
    bicubic = Image.Resampling.BICUBIC
    height, width = self.best(picture.height, picture.width)
    wide, high = width / picture.width, height / picture.height
    if wide < high:
      size = width, min(math.ceil(picture.height * wide), height)
    else:
      size = min(math.ceil(picture.width * high), width), height
    grid = Image.new("RGB", (width, height))
    corner = (width - size[0]) // 2, (height - size[1]) // 2
    grid.paste(picture.resize(size, bicubic), corner)
    side = self.side
    parts = [np.asarray(picture.resize((side, side), bicubic))]
    pixels = np.asarray(grid)
    parts += [
        pixels[top : top + side, left : left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return normalise(np.stack(parts))

  def rows(
      self, height: int, width: int, first: int = 0, newline: int = -1
  ) -> np.ndarray:
    """Which rows of features stand for a picture, in order.

    Args:
      height: of the picture, in pixels.
      width: likewise.
      first: which of the batch's tiles is its first.
      newline: the row that ends a line.

    Returns:
      i32[n]: the patches of the whole picture, then those of the grid line by
      line, without the borders, each line with its end.
    """
    begin, line = first * self.features, self.side // self.patch
    shape = self.best(height, width)
    down, across = (length // self.side for length in shape)
    inside = np.arange(self.features).reshape(line, line)
    tile = 1 + np.arange(down * across).reshape(down, 1, across, 1)
    grid = begin + tile * self.features + inside[:, None, :]
    grid = _unpadded(grid.reshape(down * line, across * line), height, width)
    ends = np.full((len(grid), 1), newline)
    lines = np.concatenate([grid, ends], axis=1)
    whole = begin + np.arange(self.features)
    return np.concatenate([whole, lines.ravel()]).astype(np.int32)

  def count(self, shape: tuple[int, int]) -> int:
    """Tiles of a grid."""
    return (shape[0] // self.side) * (shape[1] // self.side)


def _unpadded(grid: np.ndarray, height: int, width: int) -> np.ndarray:
  """The part of a grid of patches that a picture covers.

  Of uneven borders the smaller one is cut from both sides, and lengths are
  rounded down, as in the authors' code.
  """
  rows, columns = grid.shape
  if width / height > columns / rows:
    border = (rows - int(round(height * (columns / width), 7))) // 2
    return grid[border : rows - border]
  border = (columns - int(round(width * (rows / height), 7))) // 2
  return grid[:, border : columns - border]


class Shown(Protocol):
  """Conversations about pictures of any shape, as `Conversations` otherwise."""

  shown: int

  def __len__(self) -> int: ...

  def conversation(self, index: int) -> Conversation:
    """What is said, with `templates.IMAGE` where a picture is shown."""
    ...

  def pictures(self, index: int) -> Sequence[np.ndarray]:
    """The pictures, each f32[H, W, 3] in [-1, 1]."""
    ...

  def answer(self, index: int) -> str:
    """The last answer."""
    ...


class Tiled:
  """Conversations as examples whose pictures are tiles.

  Keys: those of `pack.row`, of which `source` counts the patches of all tiles
  in order and behind them one row, the end of a line; and `images`, the tiles,
  f32[shown * grids.most, side, side, 3] with zeros behind the last.
  """

  def __init__(
      self, source: Shown, formatter: Formatter, grids: Grids
  ) -> None:
    """Joins what is said with how it is written and shown."""
    self.source = source
    self.formatter = formatter
    self._grids = grids

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    conversation = self.source.conversation(index)
    return self._finish(index, self.formatter.row, conversation)

  def prompt(self, index: int) -> Example:
    """The same example up to where its last answer begins."""
    conversation = self.source.conversation(index)[:-1]
    return self._finish(index, self.formatter.prompt, conversation)

  def answer(self, index: int) -> str:
    """What the assistant should say after `prompt`."""
    return self.source.answer(index)

  def question(self, index: int) -> str:
    """What is said before `answer`, without the pictures."""
    return last_question(self.source.conversation(index))

  def pictures(self, index: int) -> Sequence[np.ndarray]:
    """The pictures of an example, whole."""
    return self.source.pictures(index)

  def _finish(
      self,
      index: int,
      write: Callable[[Conversation, Sequence[int]], Example],
      conversation: Conversation,
  ) -> Example:
    pictures = list(self.source.pictures(index))
    rows = list(self._rows([picture.shape for picture in pictures]))
    example = write(conversation, [len(own) for own in rows])
    table = np.concatenate([np.full(1, -1, np.int32), *rows])
    # Row i of the example's features is its row i of `table` behind the -1.
    example["source"] = table[example["source"] + 1]
    example["images"] = self._tiles(pictures)
    return example

  def _rows(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[np.ndarray]:
    grids = self._grids
    newline = self.source.shown * grids.most * grids.features
    first = 0
    for height, width, _ in shapes:
      yield grids.rows(height, width, first, newline)
      first += 1 + grids.count(grids.best(height, width))

  def _tiles(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    side, slots = self._grids.side, self.source.shown * self._grids.most
    shown = np.zeros((slots, side, side, 3), np.float32)
    tiles = [
        self._grids.tiles(_to_image(picture), transforms.HALF)
        for picture in pictures
    ]
    if tiles:
      found = np.concatenate(tiles)
      shown[: len(found)] = found
    return shown


def _to_image(picture: np.ndarray) -> Image.Image:
  pixels = ((np.clip(picture, -1, 1) + 1) * 127.5).round().astype(np.uint8)
  return Image.fromarray(pixels)
