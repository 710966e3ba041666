"""Who says what in TinyWorld? Spoken digits, and films that are spoken along.

Test examples are spoken by voices that are not heard in training, and show
handwriting of writers who are not seen there.
"""

from collections.abc import Sequence

import numpy as np

from mmjax.data.audio import RATE
from mmjax.data.batch import Example
from mmjax.data.tinyworld import digits, render, sounds, speech, text
from mmjax.data.tinyworld.digits import Dice, Split
from mmjax.data.tinyworld.speech import Span, Utterance
from mmjax.data.tinyworld.tasks import Deck

# What is said of a digit; the first is the shortest.
PHRASES = (
    "{digit}",
    "the digit {digit}",
    "the number {digit}",
    "it is {article} {digit}",
)
COLOURED = "{article} {colour} {digit}"
_COLOURED_SHARE = 0.5

# Where the digits of a film stand, how they rise in a second, as fractions of
# the side.
_STEPS = (0.2, 0.5, 0.8)
_FLOOR = 0.65
_RISE = 0.1
_HEIGHT = 0.36


def phrase(digit: int, colour: int, dice: Dice) -> str:
  """What one may say of a picture of a digit, in words."""
  if dice.between(0, 1) < _COLOURED_SHARE:
    template, next_word = COLOURED, text.COLOURS[colour]
  else:
    template, next_word = dice.choose(PHRASES), text.CLASSES[digit]
  return template.format(
      digit=text.CLASSES[digit],
      colour=text.COLOURS[colour],
      article="an" if next_word in ("orange", "eight") else "a",
  )


class SpokenDigits:
  """Digits that are said: `audio`, `label` (the digit).

  Every example is one utterance somewhere in a quiet room.
  """

  def __init__(
      self,
      split: Split,
      seconds: float = 1.5,
      length: int | None = None,
      seed: int = 0,
  ) -> None:
    """A source of `length` examples.

    Args:
      split: "train" or "test".
      seconds: of every example; what is longer is cut.
      length: examples an epoch; by default as many as pictures have.
      seed: another seed says other things.
    """
    self._deck = Deck.make(
        "spoken digits", split, render.SMALLEST, length, seed, variety=0.0
    )
    self._count = round(seconds * RATE)

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    utterance, digit, dice = self._deal(index)
    said = utterance.audio[: self._count]
    audio = sounds.ROOM * sounds.noise(self._count, dice)
    begin = dice.below(self._count - len(said) + 1)
    audio[begin : begin + len(said)] += dice.between(0.4, 1.0) * said
    return {"audio": np.clip(audio, -1, 1), "label": np.int32(digit)}

  def utterance(self, index: int) -> Utterance:
    """What is said, without the room; `words` has its text."""
    return self._deal(index)[0]

  def _deal(self, index: int) -> tuple[Utterance, int, Dice]:
    position, dice = self._deck.deal(index)
    digit = digits.hand(self._deck.split).labels[position]
    said = phrase(digit, dice.below(len(text.COLOURS)), dice)
    voice = dice.choose(speech.voices(self._deck.split))
    return speech.speak(said, voice), digit, dice


class SpokenFilms:
  """Digits that appear as they are said, and rise: `video`, `audio`.

  A digit is seen from the moment at which its word begins.
  """

  def __init__(
      self,
      split: Split,
      size: int = 32,
      frames: int = 8,
      seconds: float = 3.0,
      count: int = 3,
      length: int | None = None,
      seed: int = 0,
      variety: float = 1.0,
  ) -> None:
    """A source of `length` films.

    Args:
      split: "train" or "test".
      size: side of the frames in pixels.
      frames: of a film, at equal distances.
      seconds: a film lasts.
      count: digits of a film, 1 to 3.
      length: films an epoch; by default as many as pictures.
      seed: another seed is another set of films.
      variety: how far hands stray.

    Raises:
      ValueError: if an argument cannot be.
    """
    if not 1 <= count <= len(_STEPS):
      raise ValueError(f"count={count}: expected 1 to {len(_STEPS)} digits")
    self._deck = Deck.make("spoken films", split, size, length, seed, variety)
    self._size, self._frames, self._count = size, frames, count
    self._samples = round(seconds * RATE)

  def __len__(self) -> int:
    return self._deck.length

  def __getitem__(self, index: int) -> Example:
    positions, utterance, begin, dice = self._deal(index)
    colours = dice.sample(self._count, len(text.COLOURS))
    ground = dice.below(len(text.GROUNDS))
    said = utterance.audio[: self._samples]
    audio = sounds.ROOM * sounds.noise(self._samples, dice)
    audio[begin : begin + len(said)] += said
    video = [
        self._frame(index, time, positions, colours, ground)
        for time in np.arange(self._frames) * (self._samples / self._frames)
    ]
    return {"video": np.stack(video), "audio": np.clip(audio, -1, 1)}

  def words(self, index: int) -> tuple[Span, ...]:
    """The spoken digits, with times within the film."""
    _, utterance, begin, _ = self._deal(index)
    late = begin / RATE
    return tuple(
        Span(word.text, word.start + late, word.end + late)
        for word in utterance.words
    )

  def _frame(
      self,
      index: int,
      sample: float,
      positions: Sequence[int],
      colours: Sequence[int],
      ground: int,
  ) -> np.ndarray:
    """The picture at a sample of the sound."""
    canvas = render.background(
        self._size, ground, self._deck.dice(index, "ground", int(sample))
    )
    for number, word in enumerate(self.words(index)):
      since = sample / RATE - word.start
      if since >= 0:
        # The same dice for every frame: a digit keeps its hand.
        render.draw(
            canvas,
            digits.hand(self._deck.split).glyphs[positions[number]],
            colours[number],
            (_STEPS[number], _FLOOR - _RISE * since),
            _HEIGHT,
            self._deck.variety,
            self._deck.dice(index, "hand", number),
        )
    return canvas

  def _deal(self, index: int) -> tuple[list[int], Utterance, int, Dice]:
    """Positions of digits, what is said, from which sample on, and dice."""
    position, dice = self._deck.deal(index)
    labels = digits.hand(self._deck.split).labels
    positions = [position]
    positions += [dice.below(len(labels)) for _ in range(self._count - 1)]
    said = " ".join(text.CLASSES[labels[p]] for p in positions)
    utterance = speech.speak(
        said, dice.choose(speech.voices(self._deck.split))
    )
    free = self._samples - len(utterance.audio)
    return positions, utterance, dice.below(max(free, 0) + 1), dice

