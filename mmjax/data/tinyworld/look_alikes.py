"""Which scenes are easy to take for each other? A retrieval set that is hard.

Four scenes of a family have the same digits and colours in the same places, but
bound to each other in other ways: a bag of words tells no two of them apart.
"""

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.tinyworld import digits, tasks, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.text import Scene
from mmjax.data.tokenizers import ClipTokenizer

FAMILY = 4


class LookAlikes:
  """Scenes of two or three digits with captions, pairwise distinct.

  Of the first two digits of a scene, its family has another with the colours
  swapped, one with the digits swapped, and one with both.

  Keys: `image`, `tokens` and `identity`.
  """

  def __init__(
      self,
      split: Split = "test",
      n: int = 200,
      size: int = 64,
      seed: int = 0,
      tokenizer: ClipTokenizer | None = None,
      variety: float = 1.0,
      length: int | None = None,
  ) -> None:
    """A source of `n` scenes.

    Args:
      split: "train" or "test".
      n: how many scenes, a multiple of 4.
      size: side of the pictures in pixels.
      seed: another seed is another set.
      tokenizer: of the captions; by default as of `tasks.CaptionedScenes`.
      variety: how far hands stray from how they wrote.
      length: examples, by default one of each scene, with the caption that all
        scenes of a layout have. More show every scene many times, each time in
        another hand and in other words: of so few scenes a batch has several of
        a family, which are hard to tell apart.

    Raises:
      ValueError: if an argument cannot be.
    """
    if n < FAMILY or n % FAMILY:
      raise ValueError(f"n={n}: expected a multiple of {FAMILY}")
    self._deck = tasks.Deck.make(
        "look-alikes", split, size, length or n, seed, variety
    )
    self._reworded = length is not None
    self._size = size
    self._scenes = _families(n // FAMILY, seed)
    self._tokenizer = tokenizer or ClipTokenizer.tinyworld(
        length=tasks.SCENE_CAPTION_LENGTH
    )

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    scene, dice = self.scene(index), self._deck.dice(index)
    hand = digits.hand(self._deck.split)
    positions = [dice.choose(hand.of_digit[digit]) for digit in scene.digits]
    strokes = [
        self._deck.dice(index, "digit", n) for n in range(len(positions))
    ]
    return {
        "image": self._deck.draw_scene(
            positions, scene, self._size, dice, strokes
        ),
        "tokens": self._tokenizer.encode(self.caption(index)),
        "identity": np.int32(scene.identity),
    }

  def caption(self, index: int) -> str:
    """The text behind the `tokens` of an example."""
    dice = self._deck.dice(index, "caption") if self._reworded else None
    return text.scene_caption(self.scene(index), dice)

  def scene(self, index: int) -> Scene:
    """What the example shows."""
    return self._scenes[index % len(self._scenes)]


def _families(count: int, seed: int) -> list[Scene]:
  """The scenes of so many families, no two the same."""
  scenes: dict[Scene, None] = {}
  attempt = 0
  while len(scenes) < count * FAMILY:
    dice = Dice("look-alikes", seed, attempt)
    attempt += 1
    layout = dice.below(len(text.SPOTS))
    number = len(text.SPOTS[layout])
    colours = dice.sample(number, len(text.COLOURS))
    shown = dice.sample(number, len(text.CLASSES))
    family = [
        Scene(layout, tuple(_swapped(colours, a)), tuple(_swapped(shown, b)))
        for a in (False, True)
        for b in (False, True)
    ]
    if not any(scene in scenes for scene in family):
      scenes |= dict.fromkeys(family)
  return list(scenes)


def _swapped(values: list[int], swap: bool) -> list[int]:
  first, second, *rest = values
  return [second, first, *rest] if swap else values
