"""Where is the ink? Pictures of one digit with the shape that was drawn."""

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.tinyworld import digits, render, tasks
from mmjax.data.tinyworld.digits import Split
from mmjax.data.tinyworld.text import Look


class SegmentedDigits:
  """Pictures of one digit: `image`, `label` (the digit); and their ink."""

  def __init__(
      self,
      split: Split,
      size: int = 32,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
  ) -> None:
    """A source of `length` examples; as `tasks.Classification`."""
    self._size = size
    self._deck = tasks.Deck.make(
        "segmented digits", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    (image, _, _), look = self._draw(index)
    return {"image": image, "label": np.int32(look.digit)}

  def ink(self, index: int) -> np.ndarray:
    """How far ink covers each pixel, f32[size, size] in [0, 1]."""
    (_, pose, ink), _ = self._draw(index)
    found = np.zeros((self._size, self._size), np.float32)
    found[pose.window] = ink[..., 0]
    return found

  def _draw(
      self, index: int
  ) -> tuple[tuple[np.ndarray, render.Pose, np.ndarray], Look]:
    """What `Deck.posed` gives, and what is shown."""
    position, dice = self._deck.deal(index)
    look = Look.drawn(digits.hand(self._deck.split).labels[position], dice)
    return self._deck.posed(position, self._size, look, dice), look
