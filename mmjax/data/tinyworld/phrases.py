"""Which words bring out the parts of a picture? Pairs for two-tower models.

Captions that name everything let colour and place alone tell the pictures of a
batch apart, and a tower that need not read digits does not. Here most captions
of scenes are phrases that leave out what would give a picture away.
"""

from collections.abc import Sequence

import numpy as np

from mmjax.data.batch import Example
from mmjax.data.tinyworld import digits, questions, tasks, text
from mmjax.data.tinyworld.digits import Split
from mmjax.data.tinyworld.text import Look
from mmjax.data.tokenizers import ClipTokenizer

# Ids that hold a caption of four digits.
PHRASE_LENGTH = 40


class Phrases:
  """Pictures of one digit, or scenes, with phrases and captions.

  Keys: `image` and `tokens`.
  """

  def __init__(
      self,
      split: Split,
      tokenizer: ClipTokenizer | None = None,
      size: int = 64,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
      warp: float = 0.0,
      counts: Sequence[int] = (1, 2, 3, 4),
      alone: float = 0.15,
      single: float = 0.4,
      full: float = 0.3,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      tokenizer: of the captions; by default TinyWorld's own vocabulary and
        `PHRASE_LENGTH` ids.
      size: side of the pictures in pixels.
      length: as for `tasks.Classification`.
      seed: likewise.
      variety: likewise.
      warp: likewise.
      counts: how many digits a scene may show, of 1 to 4.
      alone: the share of pictures that one digit fills, as it does in those of
        `tasks.CaptionedDigits`.
      single: the share of scenes of which only one digit is drawn: its shape is
        learned sooner where it is all that there is.
      full: the share of captions that name everything in a scene.

    Raises:
      ValueError: if an argument cannot be.
    """
    self._counts = questions.checked_counts(counts)
    self._alone, self._single, self._full = alone, single, full
    self._tokenizer = tokenizer or ClipTokenizer.tinyworld(length=PHRASE_LENGTH)
    self._size = size
    self._deck = tasks.Deck.make(
        "phrases", split, size, length, seed, variety, warp
    )

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    image, caption = self._deal(index)
    return {"image": image, "tokens": self._tokenizer.encode(caption)}

  def caption(self, index: int) -> str:
    """The text behind the `tokens` of an example."""
    return self._deal(index)[1]

  def _deal(self, index: int) -> tuple[np.ndarray, str]:
    deck = self._deck
    dice = deck.dice(index)
    if dice.between(0, 1) < self._alone:
      position, _ = deck.deal(index)
      look = Look.drawn(digits.hand(deck.split).labels[position], dice)
      caption = text.digit_caption(look, dice)
      strokes = deck.dice(index, "strokes")
      return deck.draw(position, self._size, look, strokes), caption
    scenery = questions.Scenery(deck, self._size)
    positions, scene = scenery.deal(index, self._counts, dice)
    only = None
    if dice.between(0, 1) < self._single:
      only = dice.below(len(positions))
    (image,) = scenery.picture(index, positions, scene, only)
    if only is None and dice.between(0, 1) < self._full:
      return image, text.scene_caption(scene, dice)
    return image, text.scene_phrase(scene, dice, only)
