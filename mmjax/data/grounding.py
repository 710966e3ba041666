"""How do pictures with texts become rows from which texts learn to find them?

FROMAGe reads every text twice: behind its picture, as a caption, and alone, as
what must find the picture. Both stand in one row, as documents of their own.
"""

from typing import Protocol

import numpy as np

from mmjax.data import pack
from mmjax.data.batch import Example
from mmjax.data.templates import IMAGE, Formatter


class Described(Protocol):
  """A random-access source of pictures with texts."""

  def __len__(self) -> int: ...

  def answer(self, index: int) -> str:
    """The text."""
    ...

  def labels(self, index: int) -> Example:
    """Has the picture f32[H, W, 3] as `image`."""
    ...


class Grounding:
  """Rows of two pictures: two captions, joined or not, and two searches.

  Keys: those of `pack.row`; `images` f32[2, H, W, 3]; `anchors` i32[2], where
  the texts that stand alone end.
  """

  def __init__(
      self,
      source: Described,
      caption: Formatter,
      search: Formatter,
      length: int,
      join: float = 0.5,
      seed: int = 0,
  ) -> None:
    """Pairs the examples 2 i and 2 i + 1.

    Args:
      source: pictures with texts.
      caption: writes a picture and its text.
      search: writes a text alone; its last token looks for the picture.
      length: of a row.
      join: how often the second caption sees the first (section 3.3).
      seed: of what is joined.

    Raises:
      ValueError: for a probability that is none, or fewer than two examples.
    """
    if not 0 <= join <= 1 or len(source) < 2:
      raise ValueError(
          f"join={join}, {len(source)} examples: expected a probability, and "
          "two examples or more"
      )
    self._source = source
    self._caption = caption
    self._search = search
    self._length = length
    self._join = join
    self._seed = seed

  def __len__(self) -> int:
    return len(self._source) // 2

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of {len(self)} rows")
    pair = (2 * index, 2 * index + 1)
    texts = [self._source.answer(member) for member in pair]
    captions = [
        self._caption.document([("user", IMAGE), ("assistant", text)], 1)
        for text in texts
    ]
    if np.random.default_rng((self._seed, index)).random() < self._join:
      captions = [pack.joined(captions)]
    searches = [
        self._search.document([("assistant", text)], 0) for text in texts
    ]
    documents = [*captions, *searches]
    ends = np.cumsum([len(document.tokens) for document in documents]) - 1
    images = [self._source.labels(member)["image"] for member in pair]
    return pack.row(documents, self._length) | {
        "images": np.stack(images),
        "anchors": ends[-2:].astype(np.int32),
    }
